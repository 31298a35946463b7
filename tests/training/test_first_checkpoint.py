"""The checkpoint of step 0 (``extra_save_iters``): the state before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import KEYS, losses, records, train_rank, write_corpus

from megatron_lite.checkpoint.folder import complete_steps


def runs(common: dict[str, Any], folder: Path) -> list[float]:
    """A run; one that goes on from its step 0; one with stages that begins there; when step 0 was written."""
    first = {**common, "run_dir": str(folder / "first"), "zero_optimization": {"stage": 1}}
    train_rank(first, 2)
    checkpoints = folder / "first" / "checkpoints"
    written = [(checkpoints / "global_step0").stat().st_mtime_ns]
    begin = {"load": str(checkpoints), "iteration": 0}
    train_rank({**first, **begin}, 2)
    written.append((checkpoints / "global_step0").stat().st_mtime_ns)
    stages = {"pipe_parallel_size": 2, "async_save": True, "run_dir": str(folder / "stages")}
    train_rank({**common, **stages, **begin}, 2)
    return written


def test_the_beginning_is_saved_once_and_is_one_to_begin_from(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    common = {**KEYS, "data_path": str(corpus), "extra_save_iters": [0, 2], "train_iters": 3, "eval_iters": 0}
    for before, after in run_ranks(runs, 2, common, tmp_path):
        assert before == after
    assert complete_steps(tmp_path / "first/checkpoints") == [0, 2, 3]
    assert complete_steps(tmp_path / "stages/checkpoints") == [0, 2, 3]
    both = losses(records(tmp_path / "first"))
    assert len(both) == 6
    assert both[:3] == both[3:]
    assert losses(records(tmp_path / "stages")) == pytest.approx(both[:3], rel=1e-5)
