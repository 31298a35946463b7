"""Stops between two steps: by a signal, or at ``exit_interval``."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.engine import StepResult
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.utils.log import LOGGER

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""SIGUSR2, too: OpenMPI's mpirun hands that on and waits; to a SIGTERM it gives the ranks one second."""


class Stopping(Hook):
    """Ends the run after the step in which any rank got one of SIGNALS; a second SIGINT kills at once.

    All ranks must stop after the same step. They agree by summing a flag while the step runs: the collective
    starts before the step and is looked at after it, over gloo on the CPU, so that nobody waits for it and no
    accelerator is synchronised. A signal that comes during a step is therefore seen after the next one on
    several ranks, and after the very step on one.
    """

    def __init__(self, context: ParallelContext, exit_interval: int | None) -> None:
        self._context = context
        self._exit_interval = exit_interval
        self._received = 0
        self._agreed = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None
        self._group = dist.new_group(backend="gloo") if context.world_size > 1 else None
        # A signal that is ignored already stays so (nohup, a background job of a shell).
        self._previous = {each: signal.getsignal(each) for each in SIGNALS}
        for each, handler in self._previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(each, self._receive)

    def before_step(self, state: TrainState) -> None:
        """Begin to agree."""
        if self._group is not None:
            self._agreed.fill_(self._received)
            self._work = dist.all_reduce(self._agreed, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Stop if anybody wants to."""
        number = self._received
        if self._group is not None:
            self._work.wait()
            number = int(self._agreed)
        if number:
            state.stop_reason = signal.Signals(number).name
        elif self._exit_interval and state.step % self._exit_interval == 0:
            state.stop_reason = f"exit_interval {self._exit_interval}"

    def close(self) -> None:
        """Give the signals back."""
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if not self._received:
            LOGGER.info(
                "%s: finishing the step, then saving; Ctrl-C again stops at once", signal.Signals(number).name
            )
        self._received = number
