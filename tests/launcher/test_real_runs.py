"""Real training under deepy.py with a rank that is killed, under torchrun, and under srun by the sbatch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ports import free_port
from training.training_runs import KEYS, write_corpus

ROOT = Path(__file__).resolve().parents[2]
FAKE_SRUN = """#!{python}
import os, subprocess, sys
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
count = os.environ["SLURM_NTASKS"]
tasks = []
for task in range(int(count)):
    place = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_STEP_NUM_TASKS": count}}
    place["SLURM_STEP_TASKS_PER_NODE"] = count
    tasks.append(subprocess.Popen([sys.executable, *words[1:]], env={{**os.environ, **place}}))
sys.exit(max(task.wait() for task in tasks))
"""
"""Starts the tasks of a job on one node, each with SLURM's variables; this Python stands for the .venv's."""


LAYOUT = ["num_gpus=4", "pipe_parallel_size=2", "layout_account=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the configuration of an endless run.

    It saves once, soon: when it is killed depends on the machine, and layouts drift apart with the steps.
    """
    folder = tmp_path_factory.mktemp("launched")
    own = {"data_path": str(write_corpus(folder)), "train_iters": 100_000, "extra_save_iters": [10]}
    own |= {"lr_decay_style": "constant", "warmup": 0.0, "eval_iters": 0}
    (folder / "tiny.yml").write_text(yaml.safe_dump({**KEYS, **own}))
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(run: Path) -> dict[int, float]:
    """Step → loss, of all lines that are whole."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def pid_of_rank(config: Path, rank: int) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:  # has just ended, or belongs to another user
            continue
        if os.fsencode(config) in words and f"RANK={rank}".encode() in variables.split(b"\0"):
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def killed(folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run of four ranks, of which one is killed once a checkpoint is there: how it ended, and how soon."""
    config, run = folder / "tiny.yml", folder / "killed"
    process = subprocess.Popen(
        [sys.executable, "deepy.py", "train.py", str(config), "--set", *LAYOUT, f"run_dir={run}"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (run / "checkpoints/latest").exists():
        time.sleep(0.05)
    began = time.monotonic()
    if process.poll() is None:
        os.kill(pid_of_rank(config, 2), signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess([], process.returncode, out, err), time.monotonic() - began


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_killed_rank_is_named_and_ends_the_run(
    killed: tuple[subprocess.CompletedProcess[str], float],
) -> None:
    ended, seconds = killed
    assert ended.returncode == 128 + signal.SIGKILL, ended.stderr
    assert "rank 2 was ended by SIGKILL" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert seconds < 15


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_it_accounted_for_its_layout(killed: tuple[subprocess.CompletedProcess[str], float]) -> None:
    """Two stages, two micro-batches, two replicas: a line each for stages, replicas and the bubble."""
    out = killed[0].stdout
    sent = re.findall(r"^  (data|pipe) +([\d,]+) +([\d,]+)$", out, re.MULTILINE)
    assert {kind for kind, *_ in sent} == {"data", "pipe"}, out
    assert all(counted == formula for _, counted, formula in sent)
    bubble = re.findall(r"^pipeline bubble: ([\d.]+) % measured, 33\.3 % by", out, re.MULTILINE)
    assert bubble
    assert all(0 < float(share) < 100 for share in bubble)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_its_checkpoint_goes_on_under_torchrun_as_an_unbroken_run_does_under_srun(
    folder: Path, killed: tuple[subprocess.CompletedProcess[str], float]
) -> None:
    checkpoints = folder / "killed/checkpoints"
    step = int((checkpoints / "latest").read_text().strip().removeprefix("global_step"))
    end = step + 3
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = [f"run_dir={folder / 'resumed'}", f"load={checkpoints}", f"exit_interval={end}"]
    resumed = subprocess.run(
        [*torchrun, "train.py", str(folder / "tiny.yml"), "--set", *settings],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    unbroken = srun(folder, f"run_dir={folder / 'unbroken'}", f"exit_interval={end}")
    assert unbroken.returncode == 0, unbroken.stderr
    assert yaml.safe_load((folder / "unbroken/config.yml").read_text())["world_size"] == 2
    reference = losses(folder / "unbroken")
    assert list(reference) == list(range(1, end + 1))
    before, after = losses(folder / "killed"), losses(folder / "resumed")
    assert [before[n] for n in range(1, step + 1)] == pytest.approx(
        [reference[n] for n in range(1, step + 1)], rel=1e-5
    )
    assert list(after) == [step + 1, step + 2, step + 3]
    assert list(after.values()) == pytest.approx([reference[n] for n in after], rel=1e-5)


def srun(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """The shipped sbatch file on one node of two tasks, on a port that is free."""
    fake = folder / "bin/srun"
    fake.parent.mkdir()
    fake.write_text(FAKE_SRUN.format(python=sys.executable))
    fake.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(free_port() % 10_000),
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }
    search = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "docs/slurm.sbatch", str(folder / "tiny.yml"), "--set", *settings],
        cwd=ROOT, env={**environment(), **slurm, "PATH": search}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
