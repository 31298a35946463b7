"""Hosts that ssh reaches: a stand-in runs the remote command here, as sshd does, by a shell."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
host=$1; shift
[ "$host" != unknown ] || { echo "ssh: no such host $host" >&2; exit 255; }
[ "$1" != hostname ] || { echo 10.1.2.3 172.17.0.1; exit; }
exec sh -c "$*"
"""
MODEL = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 32\n"
SHOWS = """
import os, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_X"]
line = "|".join([*(os.environ[name] for name in names), *sys.argv[1:]]) + "\\n"
os.write(1, line.encode())  # at once: print under -u writes word by word, and lines of two ranks mix
"""
WAITS = """
import os, pathlib, signal, sys, time
def saves(*_):
    pathlib.Path("saved" + os.environ["RANK"]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, saves)
os.write(1, b"here\\n")  # at once, so that the lines of two ranks do not mix
if os.environ["RANK"] == os.environ.get("GLOO_DIES"):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ssh").write_text(FAKE_SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "tiny.yml").write_text(f"{MODEL}train_micro_batch_size_per_gpu: 1\n")
    return tmp_path


def deepy(folder: Path, script: str, hosts: str, *words: str, **variables: str) -> subprocess.Popen[str]:
    (folder / "probe.py").write_text(script)
    (folder / "hosts").write_text(hosts)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "deepy.py"), "probe.py", "tiny", "-H", "hosts", *words],
        cwd=folder, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it says until it ends, which is long before the ranks have slept enough."""
    try:
        return process.communicate(timeout=200)
    finally:
        process.kill()


def wait_for_ranks(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    while count:
        line = process.stdout.readline()
        assert line, finish(process)
        count -= line == "here\n"


def test_ranks_of_unlike_hosts(folder: Path) -> None:
    """Words and values that a shell would change arrive as they are; the first host's own address is used."""
    words = ["--set", "master_port=4000", "attention_config=[[[global],2]]", "wandb_group=a 'b' $HOME"]
    process = deepy(folder, SHOWS, "alpha slots=2\nbeta slots=1\n", *words, GLOO_X='x "y" $z')
    out, err = finish(process)
    assert process.returncode == 0, err
    same = "|".join(["10.1.2.3|4000", 'x "y" $z', "tiny.yml", *words, "hostfile=hosts"])
    shown = sorted(line for line in out.splitlines() if "10.1.2.3" in line)
    assert shown == [f"0|0|3|2|{same}", f"1|1|3|2|{same}", f"2|0|3|1|{same}"]


def test_a_host_that_is_not_reached_ends_the_others(folder: Path) -> None:
    process = deepy(folder, WAITS, "alpha slots=1\nunknown slots=1\n")
    _, err = finish(process)
    assert process.returncode == 255, err
    assert "no such host unknown" in err
    assert "host unknown ended with exit status 255; ssh could not connect" in err


def test_the_first_host_is_not_reached(folder: Path) -> None:
    process = deepy(folder, WAITS, "unknown slots=1\nalpha slots=1\n")
    _, err = finish(process)
    assert process.returncode == 2
    assert "error: host unknown is not reached by ssh without a password: ssh: no such host unknown" in err


def test_a_signal_reaches_the_ranks_which_save(folder: Path) -> None:
    process = deepy(folder, WAITS, "alpha slots=1\nbeta slots=2\n")
    wait_for_ranks(process, 3)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    assert process.returncode == 0, err
    assert all((folder / f"saved{rank}").exists() for rank in range(3))


def test_a_killed_rank_is_named_and_the_other_hosts_end(folder: Path) -> None:
    process = deepy(folder, WAITS, "alpha slots=1\nbeta slots=2\n", GLOO_DIES="2")
    _, err = finish(process)
    assert process.returncode == 128 + signal.SIGKILL, err
    assert "rank 2 was ended by SIGKILL" in err
    assert "host beta ended with exit status 137" in err


def test_a_killed_launcher_leaves_no_rank_behind(folder: Path) -> None:
    process = deepy(folder, WAITS, "alpha slots=1\nbeta slots=1\n")
    wait_for_ranks(process, 2)
    process.kill()
    process.wait()
    until = time.monotonic() + 200
    with contextlib.closing(process.stdout), contextlib.closing(process.stderr):  # type: ignore[type-var]
        while time.monotonic() < until and not all((folder / f"saved{rank}").exists() for rank in range(2)):
            time.sleep(0.05)
    assert all((folder / f"saved{rank}").exists() for rank in range(2))
