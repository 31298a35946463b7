"""Learning-rate schedules: pure functions of how far training is.

A schedule's shape is a factor in [0, 1] (1 at the peak, 0 at the minimum); warm-up multiplies before it.
Progress is measured in steps, the warm-up also in tokens: both are counted by the run, so that a schedule
has no state of its own to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = Callable[["Schedule", float], float]
"""(schedule, updates done, counted from 0) → factor between min_lr (0) and lr (1), after warm-up."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the number of updates already made.

    Attributes:
        style: name of a shape in :data:`SHAPES`.
        peak: lr, the largest rate.
        minimum: min_lr, which decay ends at and never goes below.
        warmup: length of the warm-up, in steps.
        decay_end: the step at which decay has reached the minimum (lr_decay_iters), warm-up included.
        decay_length: WSD only: the number of steps over which the rate falls at the end.
        decay_shape: WSD only: ``linear``, ``cosine`` or ``sqrt`` (1 - √progress).
        warmup_tokens: length of the warm-up in tokens; replaces ``warmup`` when it is not None.
    """

    style: str
    peak: float
    minimum: float = 0.0
    warmup: int = 0
    decay_end: int = 1
    decay_length: int = 0
    decay_shape: str = "linear"
    warmup_tokens: int | None = None

    def lr(self, step: int, tokens: int = 0) -> float:
        """The rate of the update after ``step`` updates (so 0 is the first) and ``tokens`` tokens seen."""
        if self.style in INVERSE_SQRT:
            return max(self.minimum, self.peak * noam_factor(step, self.warmup))
        ramp = self.warmup_factor(step, tokens)
        if ramp < 1.0:
            return self.peak * ramp
        return self.minimum + (self.peak - self.minimum) * SHAPES[self.style](self, step)

    def warmup_factor(self, step: int, tokens: int) -> float:
        """(step+1)/(warmup+1) during warm-up (nanoGPT's ramp: the first update is not wasted), 1 after it.

        With ``warmup_tokens`` w: (tokens+1)/(w+1).
        """
        if self.warmup_tokens is not None:
            return min(1.0, (tokens + 1) / (self.warmup_tokens + 1))
        return min(1.0, (step + 1) / (self.warmup + 1))

    def progress(self, step: float, start: float, length: float) -> float:
        """How much of ``length`` steps from ``start`` is done, within [0, 1]."""
        return min(1.0, max(0.0, (step - start) / length)) if length > 0 else float(step >= start)


def noam_factor(step: int, warmup: int) -> float:
    """min((s+1)^-½, (s+1)·w^-1.5) over its largest value w^-½ (Vaswani et al. 2017, section 5.3).

    With no warm-up w = 1, and the factor is (s+1)^-½.
    """
    width = max(1, warmup)
    return min((step + 1) ** -0.5, (step + 1) * width**-1.5) * math.sqrt(width)


def constant(schedule: Schedule, step: float) -> float:
    """The peak, for ever."""
    return 1.0


def linear(schedule: Schedule, step: float) -> float:
    """A straight line from the peak at the end of the warm-up to the minimum at ``decay_end``."""
    return 1.0 - schedule.progress(step, schedule.warmup, schedule.decay_end - schedule.warmup)


def cosine(schedule: Schedule, step: float) -> float:
    """½(1 + cos(π·progress)) between the end of the warm-up and ``decay_end`` (Loshchilov & Hutter 2017)."""
    done = schedule.progress(step, schedule.warmup, schedule.decay_end - schedule.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_stable_decay(schedule: Schedule, step: float) -> float:
    """The peak until ``decay_length`` steps before ``decay_end``, then down (Hu et al. 2024, MiniCPM)."""
    done = schedule.progress(step, schedule.decay_end - schedule.decay_length, schedule.decay_length)
    return DECAYS[schedule.decay_shape](done)


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "sqrt": lambda done: 1.0 - math.sqrt(done),
}
"""How WSD falls: progress of the decay in [0, 1] → factor from 1 to 0."""

SHAPES: dict[str, Shape] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": warmup_stable_decay,
}
INVERSE_SQRT = ("inverse_sqrt", "noam")
STYLES = (*SHAPES, *INVERSE_SQRT)
"""Every name that ``lr_decay_style`` may have."""
