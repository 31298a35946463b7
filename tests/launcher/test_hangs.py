"""Ranks that hang: every rank shows where it stands, and the run ends; a rank that is only slow is let be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training import watchdog as module
from megatron_lite.training.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import os, sys
from megatron_lite.launcher import local
from megatron_lite.utils.log import setup_logging
setup_logging()
local.GRACE_SECONDS = 2.0
sys.exit(local.start_ranks([sys.executable, "-c", sys.argv[1]], 3, os.environ))
"""
HANGS = """
import ctypes, time, torch, torch.distributed as dist
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.training.watchdog import Watchdog
context = context_from_environment()
def stuck_in_python():
    time.sleep(600)
def stuck_in_c():  # with the interpreter's lock in its hand
    ctypes.PyDLL(None).sleep(600)
dist.init_process_group("gloo")
with Watchdog(context, 1) as watchdog:
    dist.barrier()
    watchdog.sign("step 7")
    [lambda: None, stuck_in_python, stuck_in_c][context.rank]()
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a C library under the name None")
def test_every_rank_shows_its_stack_wherever_it_hangs() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LAUNCH, HANGS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 124, run.stderr
    assert re.search(r"^\[rank 0\] .*in step 7\. Its Python stacks:$", run.stderr, re.MULTILINE)
    assert re.search(r"^\[rank 0\] .*in all_reduce$", run.stderr, re.MULTILINE)
    assert re.search(r"^\[rank 1\] .*in stuck_in_python$", run.stderr, re.MULTILINE)
    _, _, of_rank_2 = run.stderr.partition("rank 2 shows no stacks by itself:\n")
    assert re.search(r"line \d+ in stuck_in_c$", of_rank_2, re.MULTILINE)
    assert re.search(r"rank [01] ended with exit status 124: a rank hangs", run.stderr)


def hang_in_step_3(folder: Path) -> None:
    """Two ranks of a real run, of which one does not come back from its third step."""
    from training.training_runs import KEYS, train_rank, write_corpus

    from megatron_lite.training.engine import Engine

    original, steps = Engine.train_step, []

    def train_step(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            time.sleep(600)
        return original(*arguments)

    Engine.train_step = train_step  # type: ignore[method-assign]
    own = folder / os.environ["RANK"]
    own.mkdir()
    keys = {**KEYS, "data_path": str(write_corpus(own)), "run_dir": str(folder), "distributed_timeout": 2}
    train_rank(keys, 2)


def test_a_step_of_training_that_hangs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(hang_in_step_3, 2, tmp_path, timeout=100)
    report = str(caught.value)
    assert re.search(r"\[rank 1\] .*in step 3\b", report)
    assert re.search(r"\[rank 1\] .*in train_step", report)
    assert re.search(r"\[rank 0\] .*in all_reduce", report)


class Ticks:
    """In place of the watchdog's event: each wait is a tick, before which the next of ``actions`` happens."""

    def __init__(self, actions: Iterator[Callable[[], object]]) -> None:
        self._actions = actions

    def wait(self, _seconds: float) -> bool:
        action = next(self._actions, None)
        if action is not None:
            action()
        return action is None


def told(monkeypatch: pytest.MonkeyPatch, actions: Callable[[Watchdog], Iterator[Any]]) -> list[str]:
    """What a watchdog of 10 seconds, which ticks every second, tells while ``actions`` happen."""
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    watchdog = Watchdog(ParallelContext(0, 1, 0, torch.device("cpu")), 10)
    reasons: list[str] = []
    monkeypatch.setattr(watchdog, "_end", reasons.append)
    monkeypatch.setattr(watchdog, "_wake", Ticks(actions(watchdog)))
    assert watchdog._interval == 1.0
    watchdog._watch()
    return reasons


def nothing(seconds: int) -> list[Callable[[], object]]:
    return [lambda: None] * seconds


def test_slow_is_not_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    def actions(watchdog: Watchdog) -> Iterator[Callable[[], object]]:
        fetch = watchdog.signing(lambda: None)
        yield from nothing(1700)  # the start: half an hour
        for step in range(3):
            yield lambda step=step: watchdog.sign(f"step {step}")
            yield from nothing(9)
        yield lambda: watchdog.sign("evaluation", longer=True)
        for _ in range(3):
            yield from nothing(1700)
            yield fetch

    assert told(monkeypatch, actions) == []


def test_silence_in_a_step_is_told_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def actions(watchdog: Watchdog) -> Iterator[Callable[[], object]]:
        yield lambda: watchdog.sign("evaluation", longer=True)
        yield from nothing(100)
        yield lambda: watchdog.sign("step 5")
        yield from nothing(11)

    assert told(monkeypatch, actions) == ["no sign of life for 11 s in step 5"]
