"""Runs on data files, with documents apart, under layouts of every kind: they follow the one-rank run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import KEYS, labelled_corpus, losses, records, train_rank, write_corpus

CONTEXT: dict[str, Any] = {"context_parallel_size": 2}
TENSOR: dict[str, Any] = {"model_parallel_size": 2, "sequence_parallel": True}
PIPE: dict[str, Any] = {"pipe_parallel_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ulysses, tensor": ("answers", {**CONTEXT, **TENSOR, "context_parallel_kind": "ulysses"}),
    "ring, pipe": ("answers", {**CONTEXT, **PIPE, "context_parallel_kind": "ring"}),
    "tensor, pipe": ("answers", {**TENSOR, **PIPE}),
    "ring, data": (
        "unpacked",
        {**CONTEXT, "zero_optimization": {"stage": 1}, "context_parallel_kind": "ring"},
    ),
}
"""Name → what is learned, and the layout on four ranks."""


def keys_of(kind: str, folder: Path) -> dict[str, Any]:
    """The keys of a run on the corpus in ``folder``: on packed rows with labels for answers, or on single
    documents."""
    shape = {**KEYS, "seq_length": 128, "train_iters": 3, "eval_interval": 3, "split": "8, 2"}
    shape |= {"train_micro_batch_size_per_gpu": 1, "data_path": str(folder / "corpus")}
    if kind == "answers":
        return shape | labelled_corpus(folder)
    return shape | {"pack_impl": "unpacked", "pos_emb": "learned"}


def train_each(runs: list[dict[str, Any]], world_size: int) -> list[int]:
    """One rank of several runs, one after the other in the same processes."""
    return [train_rank(keys, world_size) for keys in runs]


def test_every_layout_follows_the_one_rank_run(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    kinds = {kind: keys_of(kind, tmp_path) for kind in ("answers", "unpacked")}
    single = [{**keys, "run_dir": str(tmp_path / kind)} for kind, keys in kinds.items()]
    divided = [
        {**kinds[kind], **layout, "run_dir": str(tmp_path / name)} for name, (kind, layout) in RUNS.items()
    ]
    assert run_ranks(train_each, 1, single, 1) == [[0] * len(single)]
    assert run_ranks(train_each, 4, divided, 4) == [[0] * len(divided)] * 4
    for name, (kind, _) in RUNS.items():
        expected, found = (figures(records(tmp_path / folder)) for folder in (kind, name))
        assert len(expected) == 3 + 1
        assert found == pytest.approx(expected, abs=1e-5), name


def figures(lines: list[dict[str, Any]]) -> list[float]:
    """The training losses, and the validation loss after the last step."""
    return losses(lines) + [line["valid/loss"] for line in lines if "valid/loss" in line]
