"""Starts the ranks of one machine, watches them, and stops them together.

Not DeepSpeed's per-node launcher: that one kills every rank 30 s after a SIGTERM, whether it has saved or
not, never ends with 0 after a signal, and imports torch twice more before the first rank starts. Several
machines are the job of DeepSpeed's runner (:mod:`megatron_lite.launcher.multinode`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from megatron_lite.utils.log import LOGGER

POLL_SECONDS = 0.05
"""How often the ranks are looked at; the delay with which an end or a signal is noticed."""

GRACE_SECONDS = 5.0
"""How long ranks may take to end after another one has died; then they are killed."""

ADDRESS = "127.0.0.1"
PR_SET_PDEATHSIG = 1
FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""What the ranks get when the launcher gets a signal: a closed terminal asks them to save and end, too."""


def start_ranks(command: Sequence[str], count: int, environment: Mapping[str, str]) -> int:
    """Run ``count`` processes of ``command`` as the ranks of one machine; return the exit status of the run.

    Each process gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT on top of
    ``environment``, in a session of its own, so that a terminal's Ctrl-C reaches it once: through us.

    Returns 0 when all ranks end with 0, also after a SIGINT or SIGTERM, which are passed on so that the ranks
    can finish their step and save (a second signal kills). When a rank dies, the others are ended within
    seconds and its status is returned (128 + n for signal n, as shells do).
    """
    group = _Group()
    with _reserved_port() as port, group.receiving_signals():
        try:
            for rank in range(count):
                group.start(command, _rank_environment(environment, rank, count, port))
            return group.wait()
        finally:
            group.kill()


def _rank_environment(environment: Mapping[str, str], rank: int, count: int, port: int) -> dict[str, str]:
    return dict(environment) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free TCP port that no other program is given while the ranks run.

    The socket is bound but does not listen, so rank 0 can still listen there (both set SO_REUSEADDR).
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((ADDRESS, 0))
        yield holder.getsockname()[1]


def _end_with_parent() -> None:
    """In a new rank: ask Linux for a SIGTERM when the launcher dies, so that no rank runs on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Group:
    """The ranks of this machine as processes, in the order of their ranks."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the next rank. Only the first may read standard input."""
        stdin = None if not self.processes else subprocess.DEVNULL
        self.processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=stdin,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # safe: this process has no threads
            )
        )

    @contextlib.contextmanager
    def receiving_signals(self) -> Iterator[None]:
        """Within: signals are passed on to the ranks. A signal that was ignored stays so (nohup)."""
        previous = {each: signal.getsignal(each) for each in FORWARDED}
        for each, handler in previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(each, self._receive)
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)
        if len(self.signals) == 1:
            LOGGER.warning(
                "%s: the ranks finish their step and save; once more kills them", _signal_name(number)
            )
            self._send(FORWARDED[signal.Signals(number)])
        else:
            self.kill()

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)  # does nothing once the process has ended

    def wait(self) -> int:
        """Wait until every rank has ended, ending the others when one dies; return the run's exit status."""
        status = 0
        deadline = float("inf")
        while any(process.poll() is None for process in self.processes):
            status = status or self._first_failure()
            if status and deadline == float("inf"):
                self._send(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(POLL_SECONDS)
        return status or self._first_failure()

    def _first_failure(self) -> int:
        """The exit status of a rank that failed, named in the log; 0 while there is none."""
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if not code:
                continue
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit status {code}"
            LOGGER.error("rank %d %s; its message is above", rank, how)
            return 128 - code if code < 0 else code
        return 0

    def kill(self) -> None:
        """Kill every rank that still runs, with all that it started, and wait for the end."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _signal_name(number: int) -> str:
    return signal.Signals(number).name
