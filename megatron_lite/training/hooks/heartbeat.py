"""Signs of life for the watchdog, around every step."""

from __future__ import annotations

from megatron_lite.training.engine import StepResult
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.training.watchdog import Watchdog


class Heartbeat(Hook):
    """Tells ``watchdog`` where the run is. The first hook: what the others do after a step comes after it."""

    def __init__(self, watchdog: Watchdog, compiles: bool) -> None:
        """``compiles``: the first step does."""
        self._watchdog = watchdog
        self._compiles = compiles

    def before_step(self, state: TrainState) -> None:
        """A step begins."""
        self._watchdog.sign(f"step {state.step + 1}", longer=self._compiles)
        self._compiles = False

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Figures, evaluation, saving follow; the last two give signs of their own."""
        self._watchdog.sign(f"what follows step {state.step}")
