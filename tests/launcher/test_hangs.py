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

from megatron_lite.checkpoint import files
from megatron_lite.checkpoint.signs import Relay
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training import watchdog as module
from megatron_lite.training.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import os, sys
from megatron_lite.launcher import local
from megatron_lite.utils.log import setup_logging
setup_logging()
local.GRACE_SECONDS, local.STACK_SECONDS = 4.0, 2.0
sys.exit(local.start_ranks([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), os.environ))
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
with Watchdog(context, 3) as watchdog, watchdog.among_all():
    dist.barrier()
    watchdog.sign("step 7")
    [lambda: None, stuck_in_python, stuck_in_c][context.rank]()
    dist.all_reduce(torch.ones(1))
"""


def launch(program: str, ranks: int) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, program, str(ranks)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="needs a C library under the name None")
def test_every_rank_shows_its_stack_wherever_it_hangs() -> None:
    run = launch(HANGS, 3)
    assert run.returncode == 124, run.stderr
    assert re.search(r"^\[rank 0\] .*in step 7\. Its Python stacks:$", run.stderr, re.MULTILINE)
    assert re.search(r"^\[rank 0\] .*in all_reduce$", run.stderr, re.MULTILINE)
    assert re.search(r"^\[rank 1\] .*in stuck_in_python$", run.stderr, re.MULTILINE)
    _, _, of_rank_2 = run.stderr.partition("rank 2 shows no stacks by itself:\n")
    assert re.search(r"line \d+ in stuck_in_c$", of_rank_2, re.MULTILINE)
    assert re.search(r"rank [01] ended with exit status 124: a rank hangs", run.stderr)


WATCHDOGS: list[Watchdog] = []
"""Those of this process."""


def never_back(*_: object) -> Any:
    """Hang, and be found soon: until now, the run had the time that it takes on a busy machine."""
    for watchdog in WATCHDOGS:
        watchdog._timeout = 3.0
        watchdog.sign(watchdog._sign.doing)
    time.sleep(600)


def hang_in_step_1() -> None:
    from megatron_lite.training.engine import Engine

    Engine.train_step = never_back  # type: ignore[method-assign]


def hang_in_evaluation() -> None:
    from megatron_lite.training.engine import Engine

    Engine.eval_loss = never_back  # type: ignore[method-assign]


def hang_in_a_save() -> None:
    """In the second of the rank's two files, as on a file system that is gone."""
    from megatron_lite.checkpoint import save

    save.optimizer_file = never_back  # type: ignore[assignment]


HANGS_OF_RANK_1 = {
    "step 1": (hang_in_step_1, "run_steps", "step 1"),
    "evaluation": (hang_in_evaluation, "_mean_loss", "what follows step 2"),
    "save": (hang_in_a_save, "_write_rank", r"writing \S+/weights_00001\.safetensors"),
}
"""(what makes it hang, a function that its stack must show, what it says it was doing)"""


def hanging_rank(what: str, folder: Path) -> None:
    """Two ranks of a real run, of which the second does not come back from ``what``."""
    from training.training_runs import KEYS, train_rank, write_corpus

    enter = Watchdog.__enter__
    Watchdog.__enter__ = lambda self: (WATCHDOGS.append(self), enter(self))[1]  # type: ignore[method-assign]
    if os.environ["RANK"] == "1":
        HANGS_OF_RANK_1[what][0]()
    own = folder / os.environ["RANK"]
    own.mkdir()
    keys = {**KEYS, "data_path": str(write_corpus(own)), "run_dir": str(folder), "distributed_timeout": 200}
    train_rank({**keys, "eval_interval": 2, "checkpoint_factor": 4}, 2)


@pytest.mark.parametrize("what", HANGS_OF_RANK_1)
def test_a_rank_that_hangs_in_a_run(what: str, tmp_path: Path) -> None:
    """The rank that waits for it shows its stacks, too."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(hanging_rank, 2, what, tmp_path, timeout=300)
    report = str(caught.value)
    _, function, doing = HANGS_OF_RANK_1[what]
    assert re.search(rf"^\[rank 1\] .*in {doing}\. Its Python stacks:$", report, re.MULTILINE)
    assert re.search(rf"^\[rank 1\] .*in {function}$", report, re.MULTILINE)
    assert re.search(r"^\[rank 1\] .*in never_back$", report, re.MULTILINE)
    assert re.search(r"^\[rank 0\] .*in all_reduce$", report, re.MULTILINE)


def never_joining_rank(folder: Path) -> None:
    """Rank 1 of a real run hangs as it opens the data; rank 0 waits for it in the meeting, but not long."""
    from training.training_runs import KEYS, train_rank, write_corpus

    from megatron_lite.training import run

    rank, hangs, sign = os.environ["RANK"], folder / "hangs", Watchdog.sign

    def never_open(*_: object) -> Any:
        hangs.touch()
        time.sleep(600)

    def impatient(self: Watchdog, doing: str, longer: bool = False) -> None:
        while not hangs.exists():
            time.sleep(0.05)
        self._longer = 5.0
        sign(self, doing, longer)

    if rank == "1":
        run.open_datasets = never_open
    else:
        Watchdog.sign = impatient  # type: ignore[method-assign]
    own = folder / rank
    own.mkdir()
    keys = {**KEYS, "data_path": str(write_corpus(own)), "run_dir": str(folder), "distributed_timeout": 10}
    train_rank(keys, 2)


def test_a_rank_that_never_joins(tmp_path: Path) -> None:
    """Before the ranks have met, none can tell the others: each has its own limit, and the launcher asks."""
    program = "import pathlib, launcher.test_hangs as tests; tests.never_joining_rank(pathlib.Path({!r}))"
    run = launch(program.format(str(tmp_path)), 2)
    assert run.returncode == 124, run.stderr
    waits = r"^\[rank 0\] no sign of life for \d+ s in the ranks' meeting\. Its Python stacks:$"
    assert re.search(waits, run.stderr, re.MULTILINE), run.stderr
    assert re.search(r"^\[rank 0\] .*in _join$", run.stderr, re.MULTILINE)
    assert "rank 0 ended with exit status 124: a rank hangs" in run.stderr
    _, _, of_rank_1 = run.stderr.partition("rank 1 shows no stacks by itself:\n")
    assert re.search(r"line \d+ in never_open$", of_rank_1, re.MULTILINE)


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
        yield lambda: watchdog.sign("what takes longer", longer=True)
        for alive in (watchdog.alive, fetch, watchdog.alive):
            yield from nothing(1700)
            yield alive

    assert told(monkeypatch, actions) == []


def test_a_slow_disk_is_not_a_hang_unless_no_byte_arrives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The signs of a real file of 10,000 bytes, given as a disk of 100 bytes a second would have them."""
    monkeypatch.setattr(files, "WRITTEN", 900)
    monkeypatch.setattr(files, "FLUSHED", 2000)
    signs: list[Any] = []
    path = tmp_path / "weights"
    entry = files.write_file(
        path, [files.item_of("a", torch.rand(2500))], {}, lambda *sign: signs.append(sign)
    )
    files.check_file(tmp_path, entry)

    def actions(watchdog: Watchdog) -> Iterator[Callable[[], object]]:
        for sign in signs:
            yield lambda sign=sign: watchdog.sign(*sign)
            yield from nothing(9)
        yield from nothing(2)

    assert len(signs) == 1 + -(-10_000 // 900)
    assert told(monkeypatch, actions) == [f"no sign of life for 11 s in writing {path}"]


def test_a_thread_s_signs_count_while_it_is_awaited() -> None:
    """Also the last one from before: the thread may be waiting, for longer than a rank may be silent."""
    heard: list[Any] = []
    relay = Relay(lambda *sign: heard.append(sign))
    relay("writing")
    relay("waiting", longer=True)
    assert heard == []
    with relay.awaited():
        relay("writing on")
    relay("writing more")
    assert heard == [("waiting", True), ("writing on", False)]


def test_silence_in_a_step_is_told_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def actions(watchdog: Watchdog) -> Iterator[Callable[[], object]]:
        yield lambda: watchdog.sign("what takes longer", longer=True)
        yield from nothing(100)
        yield lambda: watchdog.sign("step 5")
        yield from nothing(11)

    assert told(monkeypatch, actions) == ["no sign of life for 11 s in step 5"]
