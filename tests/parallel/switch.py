"""The switch: a run that saves under one layout and goes on under another trains as if nothing had happened.

``make switch`` does it from each of eight layouts to each of the others, with the same global batch and with
a larger one, through the whole of ``train``: data order, schedule and optimizer state included. CI runs a
part of it (``test_switch.py``).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import LOSS_TOLERANCE, Layout, covering, layouts
from ranks import run_ranks
from training.training_runs import KEYS, records, train_rank, write_corpus

HALF, STEPS = 10, 20
BATCH, LARGER_BATCH, MICRO_BATCH = 8, 16, 4
PER_CALL = 12
"""Runs that the same processes make one after the other; their process groups add up."""

Samples = list[list[str]]
"""Of each step, the digests of its samples in order."""


@dataclass(frozen=True)
class Run:
    """A run under ``layout``; ``source`` is the layout whose checkpoint it goes on from."""

    layout: Layout
    source: Layout | None = None
    batch: int = BATCH

    @property
    def name(self) -> str:
        """Of its folder."""
        origin = "" if self.source is None else f"{self.source.name}-to-"
        return f"{origin}{self.layout.name}-batch{self.batch}"

    def keys(self, folder: Path) -> dict[str, Any]:
        """The keys of the run, whose data and all whose runs are in ``folder``."""
        keys = (
            KEYS
            | self.layout.keys
            | {"num_layers": 4, "hidden_size": 32, "train_iters": STEPS, "eval_iters": 0}
        )
        keys |= {"train_batch_size": self.batch, "train_micro_batch_size_per_gpu": MICRO_BATCH}
        keys |= {
            "data_path": str(folder / "corpus"),
            "run_dir": str(folder / self.name),
            "checkpoint_factor": HALF,
        }
        if self.source is not None:
            start = folder / Run(self.source).name / "checkpoints"
            keys |= {"load": str(start), "iteration": HALF, "checkpoint_factor": None}
        return keys


@dataclass(frozen=True)
class Story:
    """What a run did: by step, loss and gradient norm, and its samples."""

    losses: list[float]
    norms: list[float]
    samples: Samples


def run_all(runs: Sequence[Run], world_size: int, folder: Path) -> list[tuple[int, Samples]]:
    """One rank of several runs; of each, its data rank and the digests of its own samples by step."""
    from megatron_lite.training.engine import Engine
    from megatron_lite.training.pipeline_engine import PipelineEngine

    told: list[tuple[int, Samples]] = []
    for kind in (Engine, PipelineEngine):
        kind.train_step = _recorded(kind.train_step, told)
    for run in runs:
        told.append((0, []))
        train_rank(run.keys(folder), world_size)
    return told


def _recorded(train_step: Any, told: list[tuple[int, Samples]]) -> Any:
    """``train_step`` that also tells which samples it was given. Stages in the middle are given none."""

    def recorded(engine: Any, micro_batches: Any, lr: float) -> Any:
        rows = [row for batch in micro_batches for row in batch.tokens if not row.is_meta]
        pipe = engine._context.pipe
        assert bool(rows) == (pipe.rank in (0, pipe.size - 1)), "who reads samples"
        _, samples = told[-1]
        samples.append([hashlib.blake2b(row.numpy().tobytes(), digest_size=8).hexdigest() for row in rows])
        told[-1] = (engine._context.data_rank, samples)
        return train_step(engine, micro_batches, lr)

    return recorded


def stories(runs: Sequence[Run], folder: Path) -> Iterator[tuple[Run, Story]]:
    """What each of ``runs`` does; those of equal size share processes."""
    for ranks in sorted({run.layout.ranks for run in runs}):
        group = [run for run in runs if run.layout.ranks == ranks]
        for first in range(0, len(group), PER_CALL):
            part = group[first : first + PER_CALL]
            by_rank = run_ranks(run_all, ranks, part, ranks, folder)
            for run, told in zip(part, zip(*by_rank, strict=True), strict=True):
                lines = [line for line in records(folder / run.name) if "train/loss" in line]
                losses, norms = ([line[f"train/{name}"] for line in lines] for name in ("loss", "grad_norm"))
                yield run, Story(losses, norms, in_order(run.layout, told))


def in_order(layout: Layout, told: Sequence[tuple[int, Samples]]) -> Samples:
    """The samples of each step from what every rank was given: micro-batches are dealt in turn."""
    by_data_rank: dict[int, Samples] = {}
    for data_rank, samples in filter(lambda rank: any(rank[1]), told):
        assert by_data_rank.setdefault(data_rank, samples) == samples, "ranks of a replica see other samples"
    steps = []
    for parts in zip(*(by_data_rank[rank] for rank in range(layout.dp)), strict=True):
        firsts = range(0, len(parts[0]), MICRO_BATCH)
        dealt = [part[first : first + MICRO_BATCH] for first in firsts for part in parts]
        steps.append(list(itertools.chain(*dealt)))
    return steps


def difference(story: Story, expected: Story) -> float:
    """The worst relative difference of losses and norms over the steps that ``story`` has."""
    count = len(story.losses)
    pairs = [*zip(story.losses, expected.losses[-count:], strict=True)]
    pairs += zip(story.norms, expected.norms[-count:], strict=True)
    return max(abs(value / other - 1) for value, other in pairs)


def switches(pairs: Sequence[tuple[Layout, Layout]], folder: Path) -> Iterator[tuple[Run, float, bool]]:
    """Each switch (from, to), with the same batch and with a larger one; how far losses and norms are from
    the unbroken run's, and whether the samples were those that follow.

    After a larger batch there is no unbroken run to compare with: that of the first layout, which goes on
    from its own checkpoint, takes its place, and its samples must go on where the smaller batches ended.
    """
    write_corpus(folder)
    every = list(dict.fromkeys(itertools.chain(*pairs)))
    unbroken = dict(stories([Run(layout) for layout in every], folder))
    larger = Run(every[0], every[0], LARGER_BATCH)
    references = {BATCH: unbroken[Run(every[0])], LARGER_BATCH: dict(stories([larger], folder))[larger]}
    sequence = [sample for step in references[BATCH].samples for sample in step]
    follow = [sample for step in references[LARGER_BATCH].samples for sample in step]
    assert len(set(sequence)) == STEPS * BATCH, "samples that are all different"
    assert follow[: (STEPS - HALF) * BATCH] == sequence[HALF * BATCH :]
    runs = [Run(target, source, batch) for batch in (BATCH, LARGER_BATCH) for source, target in pairs]
    for run, story in stories(runs, folder):
        expected = references[run.batch]
        if run.batch == BATCH and run.source is not None:
            expected = unbroken[Run(run.source)]
        assert len(story.losses) == STEPS - HALF
        yield run, difference(story, expected), story.samples == expected.samples[HALF - STEPS :]


def eight_layouts(experts: bool) -> list[Layout]:
    """Eight that differ in as much as possible, of a model with or without experts."""
    same_model = [layout for layout in layouts() if bool(layout.ep) == experts]
    return covering([layout for layout in same_model if layout.refusal() is None])[:8]


def main() -> int:
    """Make every switch; 1 if one misses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    started, lines, missed, count = time.monotonic(), [], 0, 0

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    tell(f"{'from':<32}{'to':<32}{'batch':>8}{'difference':>12}  samples")
    for chosen in filter(None, (eight_layouts(experts=False), eight_layouts(experts=True))):
        with tempfile.TemporaryDirectory() as scratch:
            for run, error, follow in switches(list(itertools.permutations(chosen, 2)), Path(scratch)):
                miss = "" if error <= LOSS_TOLERANCE and follow else "  MISSED"
                missed, count = missed + bool(miss), count + 1
                assert run.source is not None
                batch = f"{BATCH}>{run.batch}" if run.batch != BATCH else str(BATCH)
                samples = "follow" if follow else "differ"
                tell(f"{run.source.name:<32}{run.layout.name:<32}{batch:>8}{error:12.1e}  {samples}{miss}")
    minutes = (time.monotonic() - started) / 60
    tell(f"{count} switches, {missed} missed (limit {LOSS_TOLERANCE}), {minutes:.1f} minutes")
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
