"""Real training whose standard output loses its reader while it is asked to stop: it saves all the same."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from training.training_runs import KEYS, write_corpus

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180
"""Within which a run must have begun, and ended."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An endless run that saves only its fifth step, and the one after which it is stopped."""
    folder = tmp_path_factory.mktemp("lost")
    own = {"data_path": str(write_corpus(folder)), "train_iters": 100_000, "extra_save_iters": [5]}
    own |= {"checkpoint_factor": 100_000, "lr_decay_style": "constant", "warmup": 0.0, "eval_iters": 0}
    (folder / "tiny.yml").write_text(yaml.safe_dump({**KEYS, **own}))
    return folder / "tiny.yml"


def take_terminal() -> None:
    """In the new process: its standard input is its terminal, whose end it hears of.

    Under ``nohup make test`` it would inherit that SIGHUP is ignored, and rightly train on.
    """
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(config: Path, run: Path, out: int, terminal: bool) -> subprocess.Popen[bytes]:
    """``deepy.py`` with all its output at ``out``, once the first checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, "deepy.py", "train.py", str(config), "--set", f"run_dir={run}", "num_gpus=1"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=out if terminal else subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        preexec_fn=take_terminal if terminal else None,
    )  # fmt: skip
    os.close(out)
    until = time.monotonic() + SECONDS
    while not (run / "checkpoints/latest").exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"no checkpoint in {run}")
        time.sleep(0.05)
    return process


def saved_step(run: Path) -> int:
    return int((run / "checkpoints/latest").read_text().strip().removeprefix("global_step"))


def last_step(run: Path) -> int:
    """The last of which there are figures."""
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()


def test_a_pipe_whose_reader_ends_at_ctrl_c(config: Path, tmp_path: Path) -> None:
    """As ``| tee log`` does."""
    reader, writer = os.pipe()
    process = start(config, tmp_path, writer, terminal=False)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert ended(process) == 0
    assert saved_step(tmp_path) == last_step(tmp_path) > 5


def test_a_terminal_that_is_closed(config: Path, tmp_path: Path) -> None:
    """The kernel sends the session's leader a SIGHUP; a shell would send another to each of its jobs."""
    master, terminal = pty.openpty()
    process = start(config, tmp_path, terminal, terminal=True)
    os.close(master)
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    assert ended(process) == 0
    assert saved_step(tmp_path) == last_step(tmp_path) > 5
