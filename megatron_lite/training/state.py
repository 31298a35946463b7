"""How far a run is, and the seam by which everything but the optimizer step hangs on the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.training.data_state import DataState
from megatron_lite.training.engine import StepResult


@dataclass
class TrainState:
    """The counters of a run. With the seed they say everything about the next step's data, rate and dropout.

    Attributes:
        step: optimizer steps done.
        samples: samples consumed, the index of the next training sample.
        tokens: tokens seen.
        stop_reason: set by whoever wants the loop to end after this step.
        data: which data the samples are drawn from; a checkpoint keeps it.
        aside_seconds: wall time spent on anything but training steps (evaluation, checkpoints).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    stop_reason: str | None = None
    data: DataState | None = None
    aside_seconds: float = field(default=0.0, compare=False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep the time spent within out of the training speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.aside_seconds += time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        counters = {"step": self.step, "samples": self.samples, "tokens": self.tokens}
        return counters if self.data is None else {**counters, "data": self.data.to_dict(self.samples)}


class Hook:
    """Something that happens around the steps. Each method is called on every rank, in the hooks' order."""

    def begin(self, state: TrainState) -> None:
        """Before the first step."""

    def before_step(self, state: TrainState) -> None:
        """Before each step."""

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """After each step; ``state`` counts it already. ``lr`` is the rate it used."""

    def end(self, state: TrainState) -> None:
        """After the last step, when nothing failed."""

    def close(self) -> None:
        """Last of all, whether something failed or not."""
