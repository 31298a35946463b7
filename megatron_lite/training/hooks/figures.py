"""Figures of training every ``log_interval`` steps, and the stop when nothing can be learned any more."""

from __future__ import annotations

import math
import time

import torch

from megatron_lite.config import Config
from megatron_lite.metrics import Backend
from megatron_lite.metrics.device import memory_in_use, peak_flops
from megatron_lite.metrics.progress import Progress
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.planner import flops_per_sequence
from megatron_lite.training.engine import Engine, StepResult
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.utils.errors import UserError

SKIPPED_AT_MOST = 20
"""Updates in a row that may be left out because of a gradient that is not finite."""


class TrainingError(UserError):
    """Training cannot go on: the loss is not a number, or every gradient."""


class Figures(Hook):
    """Collects the loss on the device and reports every ``log_interval`` steps and at the end.

    The loss is read and averaged over ranks only then: reading it waits for the device.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        engine: Engine,
        backends: list[Backend],
        progress: Progress,
    ) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._backends = backends
        self._progress = progress
        self._loss = torch.zeros((), device=context.device)
        self._steps = self._counted = self._skipped = 0
        self._skipped_in_a_row = 0
        self._result: StepResult | None = None
        self._lr = 0.0
        logging, dtype = config.logging, DTYPES[config.precision.precision]
        # Ranks that share a CPU measure its peak at the same time, so that each sees its own part.
        peak = logging.peak_theoretical_tflops
        self._peak = peak_flops(context.device, dtype, peak) * context.world_size
        self._sample_flops = flops_per_sequence(config)

    def begin(self, state: TrainState) -> None:
        """Start the clock."""
        self._mark(state)

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Add the step's loss; report at the interval.

        The loss of a step that fp16's loss scale spoiled does not count.
        """
        self._result, self._lr = result, lr
        self._steps += 1
        self._skipped += result.skipped
        if result.skipped and self._may_skip(result):
            self._skipped_in_a_row = 0
        else:
            self._loss += result.loss
            self._counted += 1
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if self._skipped_in_a_row == SKIPPED_AT_MOST:
            self._refuse_to_stand_still(state)
        interval = self._config.training.log_interval
        if state.step % interval == 0 or state.step == self._config.training.train_iters:
            self._report(state)

    def end(self, state: TrainState) -> None:
        """Report the steps since the last line."""
        if self._steps:
            self._report(state)

    def close(self) -> None:
        """Leave the terminal and the back ends tidy."""
        self._progress.close()
        for backend in self._backends:
            backend.close()

    def check(self, state: TrainState) -> None:
        """Raise TrainingError, on every rank alike, if a loss since the last line is not finite.

        For those who are about to save. The last step's loss is looked at in any case. Waits for the device.
        """
        if self._result is not None:
            losses = self._context.sum_over_replicas(self._loss + self._result.loss)
            self._refuse_non_finite(float(losses), state)

    def _may_skip(self, result: StepResult) -> bool:
        """Whether fp16's adaptive loss scale can still go down to cure an overflow."""
        fp16 = self._config.precision.fp16
        adaptive = self._config.precision.precision == "fp16" and fp16.loss_scale == 0
        return adaptive and result.loss_scale > fp16.min_loss_scale

    def _report(self, state: TrainState) -> None:
        assert self._result is not None
        loss = self._mean_loss()
        values = self._speed(state)  # after the loss, which waited for the device
        if loss is not None:
            self._refuse_non_finite(loss, state)
            values["train/loss"] = loss
        values |= {
            "train/lr": self._lr,
            "train/grad_norm": float(self._result.grad_norm),
            "train/tokens": float(state.tokens),
            "train/skipped_steps": float(self._skipped),
            "memory/bytes": float(memory_in_use(self._context.device)),
        }
        if self._config.precision.precision == "fp16":
            values["train/loss_scale"] = self._result.loss_scale
        if (load := self._engine.expert_load()) is not None:
            values["train/expert_load"] = load
        for backend in self._backends:
            backend.log(state.step, values)
        self._progress.update(state.step, values)
        self._loss.zero_()
        self._steps = self._counted = self._skipped = 0
        self._mark(state)

    def _mean_loss(self) -> float | None:
        """Mean loss per token since the last report, over all ranks; None when every step was skipped."""
        total = self._context.sum_over_replicas(self._loss.clone()) / self._context.replicas.size
        return float(total) / self._counted if self._counted else None

    def _refuse_non_finite(self, loss: float, state: TrainState) -> None:
        if math.isfinite(loss):
            return
        first = state.step - max(self._steps, 1) + 1
        raise TrainingError(f"the loss is {loss} in steps {first} to {state.step} {self._advice()}")

    def _refuse_to_stand_still(self, state: TrainState) -> None:
        self.check(state)
        first = state.step - SKIPPED_AT_MOST + 1
        raise TrainingError(
            f"no gradient of steps {first} to {state.step} is finite, and nothing is learned {self._advice()}"
        )

    def _advice(self) -> str:
        precision = self._config.precision.precision
        return (
            f"({precision}): go on from an earlier checkpoint with a smaller lr, a longer warmup or "
            "gradient_clipping 1.0" + ("" if precision == "fp32" else ", or try precision: fp32")
        )

    def _mark(self, state: TrainState) -> None:
        self._start = time.perf_counter()
        self._start_aside, self._start_step = state.aside_seconds, state.step
        self._start_samples, self._start_tokens = state.samples, state.tokens

    def _speed(self, state: TrainState) -> dict[str, float]:
        seconds = time.perf_counter() - self._start - (state.aside_seconds - self._start_aside)
        per_second = (state.samples - self._start_samples) / seconds
        per_step = seconds / (state.step - self._start_step)
        return {
            "speed/tokens_per_second": (state.tokens - self._start_tokens) / seconds,
            "speed/samples_per_second": per_second,
            "speed/seconds_per_step": per_step,
            "speed/mfu": per_second * self._sample_flops / self._peak,
            "speed/seconds_left": per_step * (self._config.training.train_iters - state.step),
        }
