"""Stopping and going on through ``train``: bitwise, by kill, by signal; what is refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import KEYS, losses, records, run, train_rank, write_corpus

from megatron_lite.checkpoint import find_checkpoint, read_weights
from megatron_lite.utils.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def weights(folder: Path) -> dict[str, Any]:
    return {name: value.clone() for name, value in read_weights(find_checkpoint(folder / "checkpoints"))}


def assert_same_end(folder: Path, reference: Path) -> None:
    """Bitwise: the losses of every step, the final validation loss, every weight."""
    assert losses(records(folder)) == losses(records(reference))
    assert records(folder)[-1]["valid/loss"] == records(reference)[-1]["valid/loss"]
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def several(all_keys: list[dict[str, Any]], world_size: int) -> int:
    """Several runs, one after another, in the same ranks."""
    return max(train_rank(keys, world_size) for keys in all_keys)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_and_ten_are_twenty(stage: int, precision: str, corpus: Path, tmp_path: Path) -> None:
    common = {
        **KEYS,
        "data_path": str(corpus),
        "precision": precision,
        "zero_optimization": {"stage": stage},
        "hidden_dropout": 0.1,
    }
    straight = {**common, "run_dir": str(tmp_path / "straight")}
    first = {**common, "run_dir": str(tmp_path / "broken"), "exit_interval": 10}
    second = {**common, "run_dir": str(tmp_path / "broken"), "load": str(tmp_path / "broken/checkpoints")}
    run_ranks(several, 2, [straight, first, second], 2)
    assert len(losses(records(tmp_path / "broken"))) == 20
    assert_same_end(tmp_path / "broken", tmp_path / "straight")


def killed_after_saving(keys: dict[str, Any]) -> int:
    """A rank that is killed (SIGKILL) some steps after its first checkpoint is complete."""

    def kill() -> None:
        while not (Path(keys["run_dir"]) / "checkpoints/latest").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    return train_rank(keys, 1)


def test_killed_between_checkpoints_nothing_is_lost_but_time(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    keys = {"train_iters": 10_000, "checkpoint_factor": 10, "eval_iters": 2}
    full = {**KEYS, **keys, "data_path": str(corpus), "run_dir": str(folder)}
    with pytest.raises(AssertionError, match="died without a traceback"):
        run_ranks(killed_after_saving, 1, full)
    step = int(find_checkpoint(folder / "checkpoints").name.removeprefix("global_step"))
    before = {record["step"]: record for record in records(folder)}
    assert 10 <= step < 10_000
    run(folder, corpus, load=str(folder / "checkpoints"), **{**keys, "exit_interval": step + 10})
    again = [record for record in records(folder) if record["step"] > step and "train/loss" in record]
    reference = run(tmp_path / "whole", corpus, **{**keys, "exit_interval": step + 10})
    expected = {record["step"]: record["train/loss"] for record in reference if "train/loss" in record}
    assert [expected[record["step"]] for record in again] == [record["train/loss"] for record in again]
    assert before[step]["train/loss"] == expected[step]


def command(folder: Path, corpus: Path, *overrides: str) -> list[str]:
    config = folder.parent / f"{folder.name}.yml"
    lines = {**KEYS, "data_path": str(corpus), "run_dir": str(folder)}
    config.write_text("\n".join(f"{key}: {value!r}" for key, value in lines.items()).replace("True", "true"))
    settings = ["--set", *overrides] if overrides else []
    return [sys.executable, str(ROOT / "train.py"), str(config), *settings]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_tells_how_to_go_on(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, corpus, "train_iters=100000", "lr_decay_style=constant"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = folder / "metrics.jsonl"  # a line of it: the first step is done, and signals are awaited
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    said = re.search(rf"stopped after step (\d+) \({number.name}\); go on with: (.+)", output)
    assert said, output
    step = int(said[1])
    assert losses(records(folder))[-1] is not None
    assert find_checkpoint(folder / "checkpoints").name == f"global_step{step}"
    assert f"--set load={folder / 'checkpoints'}" in said[2]


def signalled_on_rank_one(keys: dict[str, Any]) -> int:
    """Two ranks, of which only rank 1 gets the signal, in the middle of the run."""
    if os.environ["RANK"] == "1":
        log = Path(keys["run_dir"]) / "metrics.jsonl"

        def send() -> None:
            while not log.exists() or log.stat().st_size < 1000:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()
    return train_rank(keys, 2)


def test_ranks_agree_on_the_step_to_stop_after(corpus: Path, tmp_path: Path) -> None:
    keys = {**KEYS, "data_path": str(corpus), "run_dir": str(tmp_path), "train_iters": 100_000}
    assert run_ranks(signalled_on_rank_one, 2, keys) == [0, 0]
    last = records(tmp_path)[-1]["step"]
    assert find_checkpoint(tmp_path / "checkpoints").name == f"global_step{last}"
    assert last < 100_000


def test_load_without_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """An error for a folder that is not the run's own; a fresh start where load and save are the same."""
    with pytest.raises(AssertionError, match="CheckpointError: load: no checkpoint in"):
        run(tmp_path / "a", corpus, load=str(tmp_path / "elsewhere"), train_iters=1)
    assert not (tmp_path / "a").exists()
    folder = str(tmp_path / "own")
    assert len(losses(run(tmp_path / "b", corpus, load=folder, save=folder, train_iters=2))) == 2
    assert len(losses(run(tmp_path / "b", corpus, load=folder, save=folder, train_iters=4))) == 4


def test_finetune_takes_the_weights_only(corpus: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", corpus, train_iters=5)
    load = str(tmp_path / "a/checkpoints")
    fine = run(tmp_path / "b", corpus, load=load, finetune=True, train_iters=3, eval_at_start=True)
    trained = records(tmp_path / "a")[-1]["valid/loss"]
    assert fine[0]["step"] == 0
    assert fine[0]["valid/loss"] == trained
    assert [record["step"] for record in fine if "train/loss" in record] == [1, 2, 3]


def test_a_damaged_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", corpus, train_iters=2)
    checkpoint = find_checkpoint(tmp_path / "a/checkpoints")
    victim = next(checkpoint.glob("weights_*"))
    damaged = bytearray(victim.read_bytes())
    damaged[-100] ^= 0xFF
    victim.write_bytes(bytes(damaged))
    with pytest.raises(AssertionError, match="CheckpointError"):
        run(tmp_path / "b", corpus, load=str(tmp_path / "a/checkpoints"), train_iters=4)
    with pytest.raises(CheckpointError):
        weights(tmp_path / "a")


def test_resuming_with_another_batch_goes_on_with_the_next_sample(corpus: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", corpus, train_iters=4)
    load = str(tmp_path / "a/checkpoints")
    resumed = run(tmp_path / "b", corpus, load=load, train_iters=6, train_batch_size=4)
    tokens = [record["train/tokens"] for record in resumed if "train/tokens" in record]
    assert tokens[-1] == (4 * 8 + 2 * 4) * 32
