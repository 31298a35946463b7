"""The key async_save through whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import KEYS, train_rank, write_corpus

from megatron_lite.checkpoint import background, find_checkpoint, verify
from megatron_lite.training.hooks.figures import Figures
from megatron_lite.training.state import TrainState
from megatron_lite.utils.errors import CheckpointError, UserError


def several_runs(common: dict[str, Any], folder: Path) -> list[str]:
    """Runs in the same ranks: saving at the step, saving beside, a failing run, one whose disk is full."""

    def go(name: str, **keys: Any) -> None:
        train_rank({**common, "run_dir": str(folder / name), **keys}, 2)

    go("sync")
    go("beside", async_save=True)

    refuse = Figures._refuse_non_finite

    def refuse_step_4(hook: Figures, loss: float, state: TrainState) -> None:
        if state.step == 4:
            raise UserError("the loss is not a number")

    Figures._refuse_non_finite = refuse_step_4  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not a number"):
        go("failing", async_save=True, checkpoint_factor=3)
    Figures._refuse_non_finite = refuse  # type: ignore[method-assign]

    def full(*_arguments: Any) -> Path:
        raise CheckpointError("the disk is full")

    background.write_checkpoint = full  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError) as caught:
        go("full", async_save=True, extra_save_iters=[2], checkpoint_factor=None, train_iters=1000_000)
    return [str(caught.value)]


def test_runs_that_save_beside_the_training(tmp_path: Path) -> None:
    common = {
        **KEYS,
        "data_path": str(write_corpus(tmp_path)),
        "train_iters": 6,
        "checkpoint_factor": 2,
        "keep_last_n_checkpoints": 2,
        "zero_optimization": {"stage": 1},
    }
    told = run_ranks(several_runs, 2, common, tmp_path)
    assert told == [["the disk is full"]] * 2
    sync, beside = (tmp_path / name / "checkpoints" for name in ("sync", "beside"))
    assert [path.name for path in sorted(beside.iterdir())] == ["global_step4", "global_step6", "latest"]
    for path in sync.rglob("*.safetensors"):
        assert path.read_bytes() == (beside / path.relative_to(sync)).read_bytes()
    assert find_checkpoint(tmp_path / "failing" / "checkpoints").name == "global_step3"
    verify(tmp_path / "failing" / "checkpoints")
    assert not (tmp_path / "full" / "checkpoints" / "latest").exists()
