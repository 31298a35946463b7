"""Runs a function on several real ranks (gloo) and returns what each of them returns.

Processes come from a forkserver that has imported torch, DeepSpeed and the trainer once: a rank then starts
in milliseconds instead of three seconds of a core. They meet through a file, so there are no ports to
collide. A rank that fails takes the others down; every rank's traceback (or, after a time-out, every rank's
Python stack) is in the error.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks_preload"])
# Limits in seconds, for what hangs: how long the rest takes depends on what else the machine does.
LIMIT = 900.0  # for the function, from the moment on which all ranks have started
GRACE = 30.0  # in which the surviving ranks are to report their own error once one has failed
START = 300.0  # for the ranks to start
LAST_FRAME = "in _rank_main"  # faulthandler writes the innermost frame first, and the main thread last


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = LIMIT,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks; the list of their return values, by rank.

    ``function`` is a module-level function. It finds torch.distributed initialised (gloo) and the usual
    environment (RANK, WORLD_SIZE, LOCAL_RANK). Arguments and results are pickled: return Python numbers, not
    tensors. Raises AssertionError with every rank's traceback and output if any rank fails or takes longer
    than ``timeout`` seconds from the moment on which all have started.
    """
    _start_forkserver()
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        ranks = []
        for rank in range(world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            target = (function, args, rank, world_size, folder, sender, env or {})
            process = CONTEXT.Process(target=_rank_main, args=target, daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            outcomes = _collect([receiver for _, receiver in ranks], timeout)
            if len(outcomes) < world_size and not _errors(outcomes):
                _dump_stacks(ranks, outcomes, folder)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()
        if len(outcomes) == world_size and not _errors(outcomes):
            return [outcomes[rank][1] for rank in range(world_size)]
        raise AssertionError(_report(outcomes, world_size, folder, timeout))


def _start_forkserver() -> None:
    """Start the forkserver, if it does not run yet, with a path on which it finds what it is to import.

    Python 3.11 does not give it this process's ``sys.path``, and it passes over in silence what it does not
    find.
    """
    before = os.environ.get("PYTHONPATH")
    tests = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tests.parent), str(tests), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _collect(receivers: list[Connection], timeout: float) -> dict[int, tuple[bool, Any]]:
    """Each rank's (succeeded, value or traceback), until all have spoken, one has failed, or time is up."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    started, deadline = 0, time.monotonic() + START
    while len(outcomes) < len(receivers):
        pending = [receiver for rank, receiver in enumerate(receivers) if rank not in outcomes]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                message = receiver.recv()  # type: ignore[union-attr]
                if message is None:
                    started += 1
                    deadline = time.monotonic() + (timeout if started == len(receivers) else START)
                else:
                    outcomes[rank] = message
            except EOFError:
                outcomes[rank] = (False, "died without a traceback")
        if _errors(outcomes):
            deadline = min(deadline, time.monotonic() + GRACE)
    return outcomes


def _errors(outcomes: dict[int, tuple[bool, Any]]) -> bool:
    return any(not succeeded for succeeded, _ in outcomes.values())


def _dump_stacks(
    ranks: list[tuple[Any, Connection]], outcomes: dict[int, tuple[bool, Any]], folder: Path
) -> None:
    """Let the ranks that have not spoken write their stacks to their logs, and wait until they have."""
    asked = [rank for rank, (process, _) in enumerate(ranks) if rank not in outcomes and process.is_alive()]
    for rank in asked:
        os.kill(ranks[rank][0].pid, signal.SIGUSR1)
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and not all(LAST_FRAME in _log(folder, rank) for rank in asked):
        time.sleep(0.05)


def _report(outcomes: dict[int, tuple[bool, Any]], world_size: int, folder: Path, timeout: float) -> str:
    parts = []
    for rank in range(world_size):
        succeeded, value = outcomes.get(rank, (False, f"no answer after {timeout:.0f} s"))
        log = _log(folder, rank)[-5000:]
        parts.append(f"--- rank {rank}: {'finished' if succeeded else value}\n{log}")
    return "\n".join(parts)


def _log(folder: Path, rank: int) -> str:
    path = folder / f"rank{rank}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: Path,
    sender: Connection,
    env: dict[str, str],
) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **env)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
        sender.send(None)  # started
        sender.send((True, function(*args)))
        dist.barrier()  # nobody closes its sockets while another still talks
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        os._exit(0)  # skip the interpreter's shutdown: gloo threads may linger there
