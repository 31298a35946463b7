"""What a checkpoint keeps about the data, so that a resumed run goes on with the next unseen sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from megatron_lite.checkpoint.together import on_first_rank
from megatron_lite.config import Config
from megatron_lite.data.datasets import Splits, split_shares
from megatron_lite.data.fingerprint import Fingerprint
from megatron_lite.data.mixture import Phase, phase
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.batch_ramp import BatchPlan
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.log import LOGGER

Files = dict[str, list[Fingerprint]]
"""The fingerprints of the data sets of each split, in their order."""


@dataclass(frozen=True)
class DataState:
    """Where samples come from.

    Attributes:
        files: the data's fingerprints, on rank 0, which writes the checkpoints; empty on the others.
        phases: of the training data's mixture; the past ones as they were.
        cut: the keys that say which of the files' tokens a sample has (:func:`cut_of`).
    """

    files: Files
    phases: tuple[Phase, ...]
    cut: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, samples: int) -> dict[str, Any]:
        """JSON-able, after ``samples`` samples: the files, and the phases that have begun."""
        begun = [each for each in self.phases if each.first_sample < max(1, samples)]
        return {
            "files": {
                split: [each.to_dict() for each in each_file] for split, each_file in self.files.items()
            },
            "phases": [[each.first_sample, list(each.weights)] for each in begun],
            "cut": self.cut,
        }


def cut_of(config: Config) -> dict[str, Any]:
    """The keys that say which tokens of the files sample *i* has."""
    names = ("sampling_mode", "stitch", "pack_impl", "allow_chopped")
    keys = {name: getattr(config.data, name) for name in names}
    split = list(split_shares(config.data.split))  # however it is written
    return {"seed": config.training.seed, "seq_length": config.model.seq_length, "split": split, **keys}


def resume_data(
    config: Config,
    context: ParallelContext,
    datasets: Splits,
    plan: BatchPlan,
    step: int,
    samples: int,
    saved: Mapping[str, Any],
) -> DataState:
    """The data of a run that goes on after ``step`` steps and ``samples`` samples; every rank calls this.

    Args:
        saved: what :meth:`DataState.to_dict` gave to the checkpoint; empty for a new run.

    Raises:
        CheckpointError: on every rank: a file has changed since the checkpoint was written, and
            ``accept_changed_data`` does not allow that.
    """
    files: Files = {}
    cut = cut_of(config)

    def look() -> None:
        before = saved.get("cut", {})
        changed = [
            f"{key} is {cut[key]} (was {before[key]})" for key in cut if before.get(key, cut[key]) != cut[key]
        ]
        if changed:
            LOGGER.warning(
                "the training data are cut or shuffled in another way than before the checkpoint, so that "
                "samples come twice or not at all: %s",
                ", ".join(changed),
            )
        files.update(datasets.fingerprints())
        change = first_change(saved.get("files", {}), files)
        if change and not config.data.accept_changed_data:
            raise DataError(
                f"{change}: with it, samples would come twice or not at all. Give the run the data it began "
                "with, or accept_changed_data: true to go on with this"
            )
        if change:
            LOGGER.warning("%s (accept_changed_data)", change)

    on_first_rank(context, look)
    base = datasets.train.phases[0].weights
    history = [phase(first, weights) for first, weights in saved.get("phases", [])]
    if any(len(each.weights) != len(base) for each in history):
        history = []  # other data sets: a mixture that begins anew
    schedule = config.data.train_data_weights_schedule or []
    return DataState(files, plan_phases(base, schedule, plan, step, samples, history), cut)


def first_change(saved: Mapping[str, Sequence[Mapping[str, Any]]], files: Files) -> str | None:
    """In words, the first difference between the files that a checkpoint tells of and those there are now."""
    for split, entries in saved.items():
        before = [Fingerprint(**entry) for entry in entries]
        now = files[split]
        if len(before) != len(now):
            return f"there are {len(now)} {split} data sets where the checkpoint had {len(before)}"
        for old, new in zip(before, now, strict=True):
            difference = new.difference(old)
            if difference:
                moved = "" if new.path == old.path else f" (the checkpoint had {old.path} in its place)"
                return f"the {split} data {new.path} has changed since the checkpoint{moved}: {difference}"
    return None


def plan_phases(
    base: Sequence[float],
    schedule: Sequence[tuple[int, Sequence[float]]],
    plan: BatchPlan,
    step: int,
    samples: int,
    history: Sequence[Phase],
) -> tuple[Phase, ...]:
    """The phases of a mixture: those of ``history``, what the keys say now, what they say about later steps.

    Args:
        base: weights from step 0 on.
        schedule: (step, weights), the key ``train_data_weights_schedule``.
        plan: which samples later steps take.
        step: steps done.
        samples: samples consumed by them; a checkpoint's batch size may have been another.
        history: the phases that have begun, from a checkpoint.
    """
    past = [weights for at, weights in schedule if at <= step]
    current = phase(samples, past[-1] if past else base)
    if not history:
        phases = [Phase(0, current.weights)]
    elif _alike(history[-1].weights, current.weights):
        phases = list(history)
    else:
        phases = [*history, current]
    later = [(at, weights) for at, weights in schedule if at > step]
    return (*phases, *(phase(plan.samples_after(samples, at - step), weights) for at, weights in later))


def _alike(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(isclose(a, b, abs_tol=1e-12) for a, b in zip(left, right, strict=True))
