"""A real run on two hosts: network namespaces, joined by a cable, with a launcher in each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from training.training_runs import KEYS, write_corpus

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.98.7.1", "10.98.7.2")
STEPS = 3


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    """Two hosts: for each the words before a command that run it there.

    As Debian writes it, a host's own name is 127.0.1.1 in its /etc/hosts.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        pytest.skip("needs root, ip, nsenter and unshare to make network namespaces")
    names = [f"ml{os.getpid()}{letter}" for letter in "ab"]
    table = tmp_path_factory.mktemp("etc") / "hosts"
    table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                names[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                names[1],
                "netns",
                names[1],
            )
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", name)
                ip("-n", name, "link", "set", name, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        own = f'mount --bind {table} /etc/hosts && exec "$@"'
        yield [
            ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "sh", "-c", own, "sh"]
            for name in names
        ]
    finally:
        for name in names:  # the cable goes with its ends
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_two_hosts_follow_the_losses_of_one(hosts: list[list[str]], tmp_path: Path) -> None:
    """deepy.py in each of two pods of one rank, beside two ranks here."""
    own = {"data_path": str(write_corpus(tmp_path)), "exit_interval": STEPS, "eval_iters": 0}
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump({**KEYS, **own}))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("GLOO", "MASTER"))
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DLTS_HOSTFILE": str(tmp_path / "none"),
    }

    def start(before: list[str], run: str, ranks: int, **variables: str) -> subprocess.Popen[str]:
        words = [sys.executable, "deepy.py", "train.py", str(tmp_path / "tiny.yml"), "--set"]
        return subprocess.Popen(
            [*before, *words, f"num_gpus={ranks}", f"run_dir={tmp_path / run}"],
            cwd=ROOT, env={**environment, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    job = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
    started = [start([], "one", 2)]
    started += [start(hosts[index], "two", 1, **job, NODE_RANK=str(index)) for index in range(2)]
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.terminate()
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(said)
    assert len(losses(tmp_path / "one")) == STEPS
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
