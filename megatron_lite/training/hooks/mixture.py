"""How far each data set has been gone through."""

from __future__ import annotations

from megatron_lite.config import Config
from megatron_lite.data.mixture import Mixture
from megatron_lite.metrics import Backend
from megatron_lite.metrics.progress import Progress
from megatron_lite.training.batch_ramp import BatchPlan
from megatron_lite.training.engine import StepResult
from megatron_lite.training.state import Hook, TrainState

SHOWN = 16
"""Data sets that are told of on the terminal; the metrics have all."""


class MixtureReport(Hook):
    """Tells the epochs of each data set: at the start those that the run will take, at the end those it took.

    The metrics have them as ``data/epochs/NAME`` at each evaluation and at the last step.
    """

    def __init__(
        self, config: Config, data: Mixture, plan: BatchPlan, backends: list[Backend], progress: Progress
    ) -> None:
        self._training = config.training
        self._data = data
        self._plan = plan
        self._backends = backends
        self._progress = progress

    def begin(self, state: TrainState) -> None:
        """Say what the run will take."""
        steps = self._training.train_iters - state.step
        self._tell("epochs of the data in this run", self._plan.samples_after(state.samples, steps))

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Log at the interval of evaluations and at the end."""
        interval = self._training.eval_interval
        if (interval and state.step % interval == 0) or state.step == self._training.train_iters:
            values = {f"data/epochs/{name}": n for name, n in self._data.epochs(state.samples).items()}
            for backend in self._backends:
                backend.log(state.step, values)

    def end(self, state: TrainState) -> None:
        """Say what has been taken."""
        self._tell("epochs of the data so far", state.samples)

    def _tell(self, what: str, samples: int) -> None:
        epochs = list(self._data.epochs(samples).items())
        parts = [f"{name} {number:.3g}" for name, number in epochs[:SHOWN]]
        if len(epochs) > SHOWN:
            parts.append(f"and {len(epochs) - SHOWN} more")
        self._progress.print(f"{what}: {', '.join(parts)}")
