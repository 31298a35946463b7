"""What is looked at so that a run loses nothing: losses before saves, skipped updates, where saves go."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training_runs import KEYS, train_rank, write_corpus

from megatron_lite.checkpoint import find_checkpoint
from megatron_lite.config import Config, config_from_keys, load_config
from megatron_lite.config.cli import parse_command_line
from megatron_lite.metrics.progress import Progress
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.engine import StepResult
from megatron_lite.training.hooks.figures import SKIPPED_AT_MOST, Figures, TrainingError
from megatron_lite.training.run import resume_command
from megatron_lite.training.state import TrainState


class Records(list[dict[str, float]]):
    """A metrics back end that keeps what it is told."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.append(dict(values))


class NoExperts:
    """As much of an engine as the figures ask for."""

    def expert_load(self) -> None:
        return None


class Steps:
    """Figures of steps that the test makes up."""

    def __init__(self, **keys: Any) -> None:
        config = config_from_keys({**KEYS, "data_path": "unused", "train_iters": 1000, **keys}, world_size=1)
        context = ParallelContext(0, 1, 0, torch.device("cpu"))
        self.records = Records()
        progress = Progress(1000, enabled=False)
        self.figures = Figures(config, context, NoExperts(), [self.records], progress)  # type: ignore[arg-type, list-item]
        self.state = TrainState()
        self.figures.begin(self.state)

    def take(self, count: int = 1, loss: float = 2.0, skipped: bool = False, scale: float = 1.0) -> None:
        for _ in range(count):
            self.state.step += 1
            self.state.samples += 8
            norm = float("inf") if skipped else 1.0
            self.figures.after_step(self.state, StepResult(torch.tensor(loss), norm, skipped, scale), 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_left_out_are_counted_and_end_the_run_when_there_is_no_other(precision: str) -> None:
    steps = Steps(precision=precision, log_interval=50)
    steps.take(30)
    steps.take(SKIPPED_AT_MOST - 1, skipped=True)
    steps.take(1)
    assert [record["train/skipped_steps"] for record in steps.records] == [SKIPPED_AT_MOST - 1]
    assert steps.records[0]["train/loss"] == 2.0
    steps.take(SKIPPED_AT_MOST - 1, skipped=True)
    with pytest.raises(TrainingError, match=rf"no gradient of steps 51 to 70 is finite.*\({precision}\)"):
        steps.take(1, skipped=True)


def test_fp16_gives_up_only_where_the_loss_scale_cannot_go_down() -> None:
    fp16 = {"enabled": True, "min_loss_scale": 4.0}
    steps = Steps(fp16=fp16, log_interval=100)
    steps.take(3 * SKIPPED_AT_MOST, skipped=True, scale=8.0)
    steps.take(SKIPPED_AT_MOST - 1, skipped=True, scale=4.0)
    with pytest.raises(TrainingError, match="no gradient"):
        steps.take(1, skipped=True, scale=4.0)


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_found_before_a_save(found: float) -> None:
    steps = Steps(log_interval=100)
    steps.figures.check(steps.state)  # a save before the first step
    steps.take(100)
    steps.figures.check(steps.state)  # right after a line
    steps.take(2)
    steps.figures.check(steps.state)
    steps.take(1, loss=found)
    steps.take(1)
    with pytest.raises(TrainingError, match=rf"the loss is {found} in steps 101 to 104 \(fp32\)"):
        steps.figures.check(steps.state)


def test_fp16_s_skipped_steps_hide_no_loss_from_a_save() -> None:
    steps = Steps(fp16={"enabled": True}, log_interval=100)
    steps.take(3, skipped=True, scale=65536.0)
    steps.figures.check(steps.state)
    steps.take(1, loss=float("nan"), skipped=True, scale=65536.0)
    with pytest.raises(TrainingError, match="the loss is nan in steps 1 to 4"):
        steps.figures.check(steps.state)


def crash_in_evaluation(keys: dict[str, Any]) -> None:
    from megatron_lite.training.hooks.evaluation import Evaluation

    def crash(_self: Evaluation, _state: TrainState) -> None:
        raise MemoryError("the evaluation failed")

    Evaluation._evaluate = crash  # type: ignore[method-assign]
    train_rank(keys, 1)


@pytest.mark.parametrize("at_the_interval", [True, False])
def test_a_finished_run_is_saved_before_it_is_evaluated(at_the_interval: bool, tmp_path: Path) -> None:
    """By the default keys, which save at the end only; the last evaluation is one at the interval, or not."""
    keys = {**KEYS, "data_path": str(write_corpus(tmp_path)), "run_dir": str(tmp_path), "train_iters": 2}
    with pytest.raises(AssertionError, match="MemoryError: the evaluation failed"):
        run_ranks(crash_in_evaluation, 1, {**keys, "eval_interval": 2 if at_the_interval else 0})
    assert find_checkpoint(tmp_path / "checkpoints").name == "global_step2"


def save_apart(keys: dict[str, Any], world_size: int) -> int:
    """Each rank has a folder of its own where the others have theirs, as on hosts without a shared disk."""
    import os

    from megatron_lite.checkpoint import shared

    shared.PATIENCE = 0.1
    return train_rank({**keys, "save": f"{keys['run_dir']}/rank{os.environ['RANK']}"}, world_size)


def test_hosts_that_do_not_share_the_folder_are_told_at_the_start(tmp_path: Path) -> None:
    keys = {**KEYS, "data_path": str(write_corpus(tmp_path)), "run_dir": str(tmp_path), "train_iters": 2}
    with pytest.raises(AssertionError) as error:
        run_ranks(save_apart, 2, keys, 2)
    said = [line for line in str(error.value).splitlines() if "file system that all hosts share" in line]
    assert len(said) >= 2, "every rank says so"
    assert f"save: {tmp_path}/rank1 on the host" in said[0]
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()
    assert list((tmp_path / "rank0").iterdir()) == [], "the probe is gone"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"load": "elsewhere", "finetune": True},
        {"load": "my saves", "iteration": 2000, "no_load_optim": True},
    ],
)
def test_the_command_to_go_on_goes_on(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes everything from the last checkpoint of this run, whatever this run began from."""
    path = tmp_path / "run.yml"
    path.write_text(str({**KEYS, "data_path": "unused", "save": "my saves", **keys}))
    words = ["train.py", str(path), "--set", "no_load_rng=true", "train_iters=9"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.delenv("MEGATRON_LITE_COMMAND", raising=False)
    again = typed(shlex.split(resume_command(typed(words)))[1:])
    assert again.checkpoint.load == again.checkpoint.save == "my saves"
    assert again.checkpoint.iteration is None
    assert not any((again.checkpoint.finetune, again.checkpoint.no_load_optim, again.checkpoint.no_load_rng))
    assert again.training.train_iters == 9


def typed(words: list[str]) -> Config:
    """The configuration of a command ``train.py ...``."""
    paths, overrides = parse_command_line("", words[1:])
    return load_config(paths, overrides)
