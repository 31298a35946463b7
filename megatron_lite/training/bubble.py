"""The pipeline's bubble, measured: the share of the time in which stages wait instead of computing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, ReduceTiedGrads

from megatron_lite.parallel.context import ParallelContext


class Bubble:
    """Times the instructions of DeepSpeed's schedule.

    What is not a forward or a backward pass counts as waiting, so a transfer does, too. A step's time ends
    when the last stage to finish its backward passes has done so. On an accelerator the passes are waited
    for, which makes the steps slower.
    """

    def __init__(self, engine: Any, context: ParallelContext) -> None:
        self._context = context
        self._steps = 0
        self._busy = self._span = self._formula = self._start = 0.0
        self._is_training = False
        instructions = dict(engine._INSTRUCTION_MAP)
        for kind in (ForwardPass, BackwardPass):
            instructions[kind] = self._timed(instructions[kind])
        instructions[ReduceTiedGrads] = self._ending(instructions[ReduceTiedGrads])
        engine._INSTRUCTION_MAP = instructions

    def begin(self) -> None:
        """A step begins."""
        self._start = self._now()
        self._is_training = True

    def end(self, micro_batches: int) -> None:
        """A step with so many micro-batches is over."""
        self._is_training = False
        stages = self._context.pipe.size
        self._formula += (stages - 1) / (micro_batches + stages - 1)
        self._steps += 1

    def shares(self) -> tuple[float, float]:
        """(measured share, formula's share) since the last call, in percent; every rank calls this."""
        group, stages = self._context.pipe.group, self._context.pipe.size
        busy, span = torch.tensor([self._busy]), torch.tensor([self._span])
        busy, span = busy.to(self._context.device), span.to(self._context.device)
        dist.all_reduce(busy, group=group)
        dist.all_reduce(span, op=dist.ReduceOp.MAX, group=group)
        measured = 1.0 - float(busy) / (stages * float(span))
        formula = self._formula / self._steps
        self._busy = self._span = self._formula = 0.0
        self._steps = 0
        return 100 * measured, 100 * formula

    def _now(self) -> float:
        if self._context.device.type != "cpu":
            torch.get_device_module(self._context.device).synchronize()
        return time.perf_counter()

    def _timed(self, instruction: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, **arguments: Any) -> None:
            start = self._now()
            instruction(engine, **arguments)
            if self._is_training:
                self._busy += self._now() - start

        return timed

    def _ending(self, instruction: Callable[..., None]) -> Callable[..., None]:
        def ending(engine: Any, **arguments: Any) -> None:
            self._span += self._now() - self._start
            instruction(engine, **arguments)

        return ending
