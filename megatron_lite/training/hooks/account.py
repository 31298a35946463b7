"""What the layout costs: bytes sent, counted in the collectives, and the bubble, beside the formulas'."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack

import torch
import torch.distributed as dist

from megatron_lite.config import Config
from megatron_lite.metrics.progress import Progress
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.traffic import KINDS, Traffic
from megatron_lite.planner.traffic import step_traffic
from megatron_lite.training.bubble import Bubble
from megatron_lite.training.engine import StepResult
from megatron_lite.training.state import Hook, TrainState


class LayoutAccount(Hook):
    """Counts what every rank sends in a step; reports the mean every ``log_interval`` steps and at the end.

    It is the first hook, so that it counts the step and what others send before it, not their reports.
    """

    def __init__(self, config: Config, context: ParallelContext, progress: Progress) -> None:
        self._config = config
        self._context = context
        self._progress = progress
        self._traffic = Traffic(context)
        self._open = ExitStack()
        self._formula: dict[str, float] = defaultdict(float)
        self._samples = self._steps = 0

    def before_step(self, state: TrainState) -> None:
        """Begin to count."""
        self._samples = state.samples
        self._open.enter_context(self._traffic)

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Stop counting; report at the interval."""
        self._open.close()
        per_micro_batch = self._config.batch.train_micro_batch_size_per_gpu * self._context.data_size
        micro_batches = (state.samples - self._samples) / per_micro_batch
        for kind, size in step_traffic(self._config, micro_batches).items():
            self._formula[kind] += size
        self._steps += 1
        if state.step % self._config.training.log_interval == 0:
            self._report()

    def end(self, state: TrainState) -> None:
        """Report the steps since the last account."""
        if self._steps:
            self._report()

    def close(self) -> None:
        """Leave torch as it was, also after an error within a step."""
        self._open.close()

    def _report(self) -> None:
        own = [self._traffic.bytes[kind] / self._steps for kind in KINDS]
        counted = torch.tensor(own, dtype=torch.float64, device=self._context.device)
        if self._context.world_size > 1:
            dist.all_reduce(counted)
        counted /= self._context.world_size
        formula = {kind: size / self._steps for kind, size in self._formula.items()}
        self._progress.print(account(dict(zip(KINDS, counted.tolist(), strict=True)), formula))
        self._traffic.bytes.clear()
        self._formula.clear()
        self._steps = 0


class BubbleReport(Hook):
    """Reports the pipeline's bubble every ``log_interval`` steps and at the end: its mean since then."""

    def __init__(self, config: Config, bubble: Bubble, progress: Progress) -> None:
        self._interval = config.training.log_interval
        self._bubble = bubble
        self._progress = progress
        self._steps = 0

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Report at the interval."""
        self._steps += 1
        if state.step % self._interval == 0:
            self._report()

    def end(self, state: TrainState) -> None:
        """Report the steps since the last report."""
        if self._steps:
            self._report()

    def _report(self) -> None:
        measured, formula = self._bubble.shares()
        self._progress.print(f"pipeline bubble: {measured:.1f} % measured, {formula:.1f} % by (p-1)/(m+p-1)")
        self._steps = 0


def account(counted: dict[str, float], formula: dict[str, float]) -> str:
    """The lines of an account: bytes by kind, counted and by formula."""
    lines = [f"{'bytes sent by a rank in a step':<32}{'counted':>16}{'formula':>16}"]
    for kind in KINDS:
        if counted[kind] or formula.get(kind):
            expected = f"{formula[kind]:16,.0f}" if kind in formula else ""
            lines.append(f"  {kind:<30}{counted[kind]:16,.0f}{expected}")
    return "\n".join(lines) if len(lines) > 1 else "bytes sent by a rank in a step: none"
