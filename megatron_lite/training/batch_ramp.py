"""How many samples each step takes: constant, or growing by tokens (GPT-3's batch ramp).

The batch of a step is a function of the samples consumed before it, and those have a closed form: the data
position, the tokens seen and the learning rate of any step are known without running the steps before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_lite.utils.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """A run of steps with one batch size: ``batch`` samples a step, from ``first_step`` on."""

    first_step: int
    first_sample: int
    batch: int


@dataclass(frozen=True)
class BatchPlan:
    """The batch size of every step.

    Attributes:
        stages: in order; the last one lasts for ever.
        seq_length: tokens of a sample.
    """

    stages: tuple[Stage, ...]
    seq_length: int

    def batch(self, samples: int) -> int:
        """Samples of the step that begins after ``samples`` samples were consumed."""
        return self._stage(samples, lambda stage: stage.first_sample).batch

    def samples(self, step: int) -> int:
        """Samples consumed before step ``step`` (from 0) of a run that begins with this plan."""
        stage = self._stage(step, lambda stage: stage.first_step)
        return stage.first_sample + (step - stage.first_step) * stage.batch

    def tokens(self, step: int) -> int:
        """Tokens seen before step ``step``."""
        return self.samples(step) * self.seq_length

    def following(self, samples: int, steps: int) -> Iterator[tuple[int, int]]:
        """(first sample, number of samples) of each of ``steps`` steps, from the one after ``samples`` on."""
        for _ in range(steps):
            count = self.batch(samples)
            yield samples, count
            samples += count

    def samples_after(self, samples: int, steps: int) -> int:
        """Samples consumed when ``steps`` more steps have been done after ``samples`` samples."""
        for stage, end in pairwise(self.stages):
            in_stage = -(-max(0, end.first_sample - samples) // stage.batch)
            if steps <= in_stage:
                return samples + steps * stage.batch
            samples += in_stage * stage.batch
            steps -= in_stage
        return samples + steps * self.stages[-1].batch

    def _stage(self, position: int, start: Callable[[Stage], int]) -> Stage:
        return self.stages[bisect_right(self.stages, position, key=start) - 1]


def plan_batches(full: int, seq_length: int, ramp: Sequence[int] | None, quantum: int) -> BatchPlan:
    """The plan for ``train_batch_size`` = ``full`` and ``rampup_batch_size`` = [start, increment, tokens].

    The range from ``start`` to ``full`` is crossed in equal stretches of tokens, one per increment; a
    stretch ends with the first step that completes it. ``quantum`` is micro-batch times data-parallel ranks:
    a batch grows by whole gradient accumulation steps. Raises ConfigError when it cannot.
    """
    if ramp is None:
        return BatchPlan((Stage(0, 0, full),), seq_length)
    start, increment, tokens = ramp
    for name, value in (
        ("start", start),
        ("increment", increment),
        ("train_batch_size - start", full - start),
    ):
        if value % quantum:
            raise ConfigError(
                f"rampup_batch_size: {name} = {value} is not a multiple of {quantum} samples (micro-batch x "
                "data-parallel ranks), by which the batch grows; change it or train_micro_batch_size_per_gpu"
            )
    if not 0 < start <= full or increment <= 0 or (full - start) % increment:
        raise ConfigError(
            f"rampup_batch_size: {start} does not grow to {full} (train_batch_size) in steps of {increment}; "
            "give [start, increment, tokens] with (train_batch_size - start) a multiple of the increment"
        )
    increments = (full - start) // increment
    stages = [Stage(0, 0, start)]
    for index in range(increments):
        current = stages[-1]
        target = -(-tokens * (index + 1) // (increments * seq_length))  # samples, rounded up
        steps = -(-max(0, target - current.first_sample) // current.batch)
        first_sample = current.first_sample + steps * current.batch
        stages.append(Stage(current.first_step + steps, first_sample, current.batch + increment))
    return BatchPlan(tuple(stages), seq_length)
