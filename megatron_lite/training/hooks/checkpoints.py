"""Checkpoints: at intervals, at the end, and when the run is stopped."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.checkpoint import save_checkpoint
from megatron_lite.config import Config
from megatron_lite.config.sections.checkpoint import CheckpointSection
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.engine import Engine, StepResult
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.utils.log import LOGGER


class Checkpoints(Hook):
    """Saves into the folder ``save`` at the steps of :func:`is_due`, and after the last step."""

    def __init__(self, config: Config, context: ParallelContext, engine: Engine) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._saved_step: int | None = None

    def begin(self, state: TrainState) -> None:
        """A run that has nothing left to do has nothing to save."""
        self._saved_step = state.step

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Save when due."""
        if is_due(state.step, self._config.checkpoint):
            self._save(state)

    def end(self, state: TrainState) -> None:
        """Save the final state."""
        self._save(state)

    def _save(self, state: TrainState) -> None:
        if self._saved_step == state.step:
            return
        keys = self._config.checkpoint
        with state.aside():
            path = save_checkpoint(
                Path(keys.save),
                state.step,
                self._engine.deepspeed,
                state.to_dict(),
                self._config.flat(),
                self._context,
                keys.keep_last_n_checkpoints,
            )
        self._saved_step = state.step
        LOGGER.info("saved %s", path)


def is_due(step: int, keys: CheckpointSection) -> bool:
    """Whether ``step`` is to be saved: a multiple of ``checkpoint_factor``, or one of ``extra_save_iters``.

    With ``checkpoint_scale: log`` the powers of ``checkpoint_factor``, rounded down, take the place of its
    multiples: 1, f, f², … (GPT-NeoX's rule).
    """
    if step in keys.extra_save_iters:
        return True
    factor = keys.checkpoint_factor
    if factor is None:
        return False
    if keys.checkpoint_scale == "linear":
        return step % max(1, int(factor)) == 0
    power = 1.0
    while int(power) < step and factor > 1:
        power *= factor
    return int(power) == step
