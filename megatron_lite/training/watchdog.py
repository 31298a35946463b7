"""Finds ranks that hang: one that is silent for too long makes every rank show its Python stacks and end."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch.distributed.distributed_c10d import _get_default_store

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.utils.errors import HANG

LONGER_SECONDS = 1800.0
"""What nobody can give signs in may be silent at least this long: compiling, waiting for others' disks."""

POLL_SECONDS = 2.0
"""How often the threads look, at most; one small message a rank to the store on rank 0."""

STAGGER_SECONDS = 0.1
"""The ranks of a machine show their stacks this long after each other, so that they do not mix."""

STUCK_SECONDS = 30.0
"""How much later C code speaks up when not even this module's threads get to run."""

KEY = "megatron_lite/hang"
NAME = "watchdog"

P = ParamSpec("P")
R = TypeVar("R")


class Sign(NamedTuple):
    """A sign of life: what the rank does from now on, and for how many seconds it may be silent."""

    doing: str
    patience: float


class Watchdog:
    """Watches over this rank, from before the ranks meet; a context manager.

    The rank gives a sign of life at every step, at every micro-batch and at every read and write of a
    checkpoint (:meth:`sign`, :meth:`alive`); that costs one assignment. A thread counts the seconds since the
    last one. When they are too many, it writes the Python stacks of all the rank's threads to standard error,
    every line with its rank, and ends with status HANG. Within :meth:`among_all` it tells the other ranks
    first, through the process group's store, and they do the same: those that wait in a collective for the
    one that hangs show their stacks, too. Before, there is no store: those that wait for it to join have
    their own limit, which has the same length.

    Where no thread of ours gets to run, because C code holds the interpreter's lock, the stacks come from
    ``faulthandler``: on SIGUSR1, which our launcher sends to a rank that does not end, or by a timer.

    The seconds are counted by the thread and not read from a clock: a run that was stopped with all its ranks
    (``scontrol suspend``, a laptop asleep) has not been silent meanwhile.
    """

    def __init__(self, context: ParallelContext, timeout: float) -> None:
        """Watch ``context``'s rank. ``timeout``: the key ``distributed_timeout``, seconds."""
        self._context = context
        self._timeout = timeout
        self._longer = longest_silence(timeout)
        self._interval = min(POLL_SECONDS, timeout / 10)
        self._sign = Sign("the start", self._longer)
        self._wake = threading.Event()
        self._alarm: str | None = None
        self._store: Any = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR1, file=2)
        self._start(self._watch)
        return self

    def __exit__(self, *error: object) -> None:
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * POLL_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def among_all(self) -> Iterator[None]:
        """Within, where there is the run's process group: this rank hears of the others, and they of it.

        The watch ends here, while the store is still there.
        """
        if self._context.world_size > 1:
            store: Any = _get_default_store()
            self._store = store.clone()  # a connection of its own: the main thread may be waiting
            self._start(self._listen)
        try:
            yield
        finally:
            self.__exit__()

    def _start(self, job: Callable[[], None]) -> None:
        thread = threading.Thread(target=job, name=NAME, daemon=True)
        self._threads.append(thread)
        thread.start()

    def sign(self, doing: str, longer: bool = False) -> None:
        """Give a sign of life; ``longer`` when none can come for longer than ``timeout``."""
        self._sign = Sign(doing, self._longer if longer else self._timeout)

    def alive(self, *_: object) -> None:
        """Give a sign of life that says nothing new; any arguments, so that it can be a hook of a module."""
        self._sign = Sign(*self._sign)

    def signing(self, function: Callable[P, R]) -> Callable[P, R]:
        """``function``, each call of which is a sign of life."""

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            self.alive()
            return function(*args, **kwargs)

        return run

    def _watch(self) -> None:
        seen, silence = self._sign, 0.0
        while not self._wake.wait(self._interval):
            silence = silence + self._interval if self._sign is seen else 0.0
            seen = self._sign
            faulthandler.dump_traceback_later(seen.patience + STUCK_SECONDS, exit=True, file=2)
            if silence > seen.patience:
                self._end(f"no sign of life for {silence:.0f} s in {seen.doing}")
        if self._alarm is not None:
            self._end(f"{self._alarm}; this rank is in {seen.doing}")

    def _listen(self) -> None:
        while not self._wake.wait(self._interval):
            try:
                if not self._store.check([KEY]):
                    continue
                self._alarm = self._store.get(KEY).decode()
            except RuntimeError:  # rank 0 has ended, and the store with it: the launcher ends this rank
                return
            self._wake.set()

    def _end(self, reason: str) -> None:
        """Show the stacks, and end once the other ranks have had the time to."""
        faulthandler.cancel_dump_traceback_later()
        # From yet another thread, for it does not come back when it is rank 0, with the store, that hangs.
        threading.Thread(target=self._tell_others, args=(reason,), name=NAME, daemon=True).start()
        time.sleep(STAGGER_SECONDS * self._context.local_rank)
        rank = self._context.rank
        lines = [f"{reason}. Its Python stacks:", *python_stacks()]
        for line in lines:  # one write each: a line of one rank is never cut by another's
            with contextlib.suppress(OSError):  # the terminal or the pipe may be gone
                os.write(2, f"[rank {rank}] {line}\n".encode())
        time.sleep(2 * self._interval + 1.0)
        os._exit(HANG)

    def _tell_others(self, reason: str) -> None:
        if self._store is not None and self._alarm is None:
            self._store.set(KEY, f"rank {self._context.rank} has told: {reason}")


def longest_silence(timeout: float) -> float:
    """Seconds without a sign of life that are never too many, with ``distributed_timeout`` ``timeout``."""
    return max(timeout, LONGER_SECONDS)


def python_stacks() -> Iterator[str]:
    """The lines of the stacks of this process's threads, the main thread's first, the watchdog's left out."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread.name != NAME]
    for thread in sorted(threads, key=lambda each: each is not threading.main_thread()):
        if thread.ident in frames:
            yield f"{thread.name}:"
            for entry in traceback.format_stack(frames[thread.ident]):
                yield from entry.rstrip().splitlines()
