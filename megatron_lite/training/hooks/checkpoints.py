"""Checkpoints: at intervals, at the end, and when the run is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_lite.checkpoint import save_checkpoint
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.folder import complete_steps
from megatron_lite.checkpoint.shared import check_shared
from megatron_lite.checkpoint.signs import Sign
from megatron_lite.config import Config
from megatron_lite.config.sections.checkpoint import CheckpointSection
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.engine import Engine, StepResult
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.utils.log import LOGGER


class Checkpoints(Hook):
    """Saves into the folder ``save`` at the steps of :func:`is_due`, and after the last step.

    ``check`` is asked before: it raises when the state is not worth keeping, so that no sound checkpoint is
    replaced by it.

    With ``async_save`` the bytes reach the disk while the next steps run; a save waits for the one before it,
    and the end of the run for the last one. One that failed ends the run at the next step. ``sign`` is told
    that the rank lives while it saves.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        engine: Engine,
        check: Callable[[TrainState], None],
        sign: Sign,
    ) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._check = check
        self._sign = sign
        self._saved_step: int | None = None
        self._background = BackgroundSaver(context, sign) if config.checkpoint.async_save else None

    def begin(self, state: TrainState) -> None:
        """See that the folder can be used; save the beginning when due, unless the run goes on from it."""
        keys = self._config.checkpoint
        check_shared(Path(keys.save), self._context, self._sign)
        if state.step == 0 and is_due(0, keys) and not _begins_from_own(keys):
            self._save(state)
        self._saved_step = state.step

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Save when due, and what the run ends with."""
        if self._background is not None:
            _tell(self._background.poll())
        is_last = state.stop_reason is not None or state.step == self._config.training.train_iters
        if is_last or is_due(state.step, self._config.checkpoint):
            self._save(state)

    def end(self, state: TrainState) -> None:
        """Wait until the last save is on the disk."""
        if self._background is not None:
            _tell(self._background.wait())

    def close(self) -> None:
        """Finish the save that is under way, also when the run failed: it is of an earlier, sound step."""
        if self._background is not None:
            self._background.close()

    def _save(self, state: TrainState) -> None:
        if self._saved_step == state.step:
            return
        self._check(state)
        keys = self._config.checkpoint
        folder, last = Path(keys.save), keys.keep_last_n_checkpoints
        what = (self._engine.deepspeed, state.to_dict(), self._config.flat())
        with state.aside():
            if self._background is None:
                _tell(save_checkpoint(folder, state.step, *what, self._context, last, self._sign))
            else:
                _tell(self._background.start(folder, state.step, *what, last))
        self._sign(f"what follows saving step {state.step}")
        self._saved_step = state.step


def _tell(saved: Path | None) -> None:
    if saved is not None:
        LOGGER.info("saved %s", saved)


def _begins_from_own(keys: CheckpointSection) -> bool:
    """Whether a run at step 0 has loaded the checkpoint that it would save."""
    return keys.loads_own and not keys.finetune and 0 in complete_steps(Path(keys.save))


def is_due(step: int, keys: CheckpointSection) -> bool:
    """Whether ``step`` is to be saved: a multiple of ``checkpoint_factor``, or one of ``extra_save_iters``.

    With ``checkpoint_scale: log`` the powers of ``checkpoint_factor``, rounded down, take the place of its
    multiples: 1, f, f², … (GPT-NeoX's rule). 0, before the first step, is none of either.
    """
    if step in keys.extra_save_iters:
        return True
    factor = keys.checkpoint_factor
    if factor is None or step == 0:
        return False
    if keys.checkpoint_scale == "linear":
        return step % max(1, int(factor)) == 0
    power = 1.0
    while int(power) < step and factor > 1:
        power *= factor
    return int(power) == step
