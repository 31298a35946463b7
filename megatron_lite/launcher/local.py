"""Starts the ranks of one machine, watches them, and stops them together.

Not DeepSpeed's per-node launcher: that one kills every rank 30 s after a SIGTERM, whether it has saved or
not, never ends with 0 after a signal, and imports torch twice more before the first rank starts. On several
machines ssh (:mod:`megatron_lite.launcher.ssh`) or Kubernetes starts one such launcher on each.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_lite.utils.errors import ERRORS_VARIABLE, EXIT_CODE, HANG, LOST_RANK, ConfigError
from megatron_lite.utils.log import LOGGER

POLL_SECONDS = 0.05
"""How often the ranks are looked at; the delay with which an end or a signal is noticed."""

PAUSE_SECONDS = 1.0
"""How long after the death of a rank the others are asked to end. Most have ended: their connection broke."""

GRACE_SECONDS = 5.0
"""How long ranks may take to end after that, or after one has told of a hang; then they are killed."""

STACK_SECONDS = 0.5
"""How long a rank that does not end by itself gets to write its Python stacks."""

ADDRESS = "127.0.0.1"
PR_SET_PDEATHSIG = 1
FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""What the ranks get when the launcher gets a signal: a closed terminal asks them to save and end, too."""


@dataclass(frozen=True)
class Share:
    """The ranks of one machine among those of several.

    Attributes:
        first: number of the first of them.
        world_size: ranks of the whole run.
        address: where all ranks meet.
        port: the port there.
    """

    first: int
    world_size: int
    address: str
    port: int


def start_ranks(
    command: Sequence[str],
    count: int,
    environment: Mapping[str, str],
    port: int | None = None,
    share: Share | None = None,
) -> int:
    """Run ``count`` processes of ``command`` as the ranks of one machine; return the exit status of the run.

    Each process gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT on top of
    ``environment``, in a session of its own, so that a terminal's Ctrl-C reaches it once: through us. They
    meet at ``port`` (None: any free one), or, with a ``share`` in the ranks of several machines, there.

    Returns 0 when all ranks end with 0, also after a SIGINT or SIGTERM, which are passed on so that the ranks
    can finish their step and save (a second signal kills). When a rank dies, the others are ended within
    seconds and its status is returned (128 + n for signal n, as shells do); when one hangs, HANG.

    Raises ConfigError when ``port`` is taken.
    """
    first, world_size = (share.first, share.world_size) if share else (0, count)
    with (
        contextlib.nullcontext((share.address, share.port)) if share else _reserved_address(port) as meeting,
        tempfile.TemporaryDirectory(prefix="megatron_lite-") as errors,
    ):
        group = _Group(first, Path(errors))
        with receiving_signals(group.receive):
            try:
                for local_rank in range(count):
                    variables = {
                        "RANK": first + local_rank,
                        "LOCAL_RANK": local_rank,
                        "WORLD_SIZE": world_size,
                        "LOCAL_WORLD_SIZE": count,
                        "MASTER_ADDR": meeting[0],
                        "MASTER_PORT": meeting[1],
                        ERRORS_VARIABLE: errors,
                    }
                    texts = {name: str(value) for name, value in variables.items()}
                    group.start(command, {**environment, **texts})
                return group.wait()
            finally:
                group.end()


@contextlib.contextmanager
def _reserved_address(port: int | None) -> Iterator[tuple[str, int]]:
    """This machine and ``port``, or any free TCP port that no other program is given while the ranks run.

    The socket is bound but does not listen, so rank 0 can still listen there (both set SO_REUSEADDR).
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((ADDRESS, port or 0))
        except OSError as error:
            raise ConfigError(
                f"master_port {port}: {error.strerror}; leave the key out, and a free port is taken"
            ) from error
        yield ADDRESS, holder.getsockname()[1]


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """In a new process: ask Linux for a signal when the launcher dies, so that no rank runs on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def hang_up_once() -> None:
    """In a signal's handler: a SIGHUP from now on is no second signal, which would kill.

    Of a terminal that closes, both the shell and the kernel send one.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def receiving_signals(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within: ``receive`` gets every signal of FORWARDED that was not ignored (nohup)."""
    previous = {each: signal.getsignal(each) for each in FORWARDED}
    for each, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(each, receive)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


class _Group:
    """The ranks of this machine as processes, in the order of their ranks, which begin with ``first``.

    ``errors`` is the folder in which a rank leaves the message of its UserError.
    """

    def __init__(self, first: int, errors: Path) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []
        self.first = first
        self.errors = errors
        self.lost_since: float | None = None
        self.told: str | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the next rank. Only the first may read standard input."""
        stdin = None if not self.processes else subprocess.DEVNULL
        self.processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=stdin,
                start_new_session=True,
                preexec_fn=end_with_parent,  # safe: this process has no threads
            )
        )
        # A signal may have come before it could be told. Told twice, it ends as well: it has just begun.
        if len(self.signals) > 1:
            self.kill()
        elif self.signals:
            self.processes[-1].send_signal(FORWARDED[signal.Signals(self.signals[0])])

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Pass a signal on to the ranks; a second one kills them."""
        hang_up_once()
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
        status, began = 0, time.monotonic()
        measures: list[tuple[float, Callable[[], None]]] = []
        while any(process.poll() is None for process in self.processes):
            if not status:
                status, began = self._first_failure(), time.monotonic()
                measures = self._measures(status)
            while measures and time.monotonic() > began + measures[0][0]:
                measures.pop(0)[1]()
            time.sleep(POLL_SECONDS)
        status = status or self._first_failure(all_have_ended=True)
        self._show_other_messages()
        return status

    def _measures(self, status: int) -> list[tuple[float, Callable[[], None]]]:
        """What is done, and when (seconds), with the ranks that go on when one has ended with ``status``."""
        if status == HANG:  # the others end by themselves, once each has shown its stacks
            return [(GRACE_SECONDS, self._ask_for_stacks), (GRACE_SECONDS, self.kill)]
        ask = partial(self._send, signal.SIGTERM)
        return [(PAUSE_SECONDS, ask), (PAUSE_SECONDS + GRACE_SECONDS, self.kill)] if status else []

    def _first_failure(self, all_have_ended: bool = False) -> int:
        """The exit status of the rank that failed first, named in the log; 0 while there is none.

        Of several that have failed since the last look, one that a signal ended: nobody else sends any yet. A
        rank that has lost another one is not at fault: the other's end may only take longer to be seen.
        """
        codes = {rank: process.poll() for rank, process in enumerate(self.processes, self.first)}
        failed = {rank: code for rank, code in codes.items() if code}
        at_fault = {rank: code for rank, code in failed.items() if code != LOST_RANK}
        if failed and not at_fault:
            self.lost_since = self.lost_since or time.monotonic()
            if all_have_ended or time.monotonic() > self.lost_since + GRACE_SECONDS:
                at_fault = failed
        if not at_fault:
            return 0
        rank, code = min(at_fault.items(), key=lambda item: item[1] > 0)
        message = self._message(rank)
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
        LOGGER.error("rank %d %s", rank, _how_it_ended(code))
        self.told = message
        return 128 - code if code < 0 else code

    def _message(self, rank: int) -> str | None:
        path = self.errors / str(rank)
        return path.read_text() if path.exists() else None

    def _show_other_messages(self) -> None:
        """What others had to say that failed by themselves, if it is something else."""
        for rank, process in enumerate(self.processes, self.first):
            message = self._message(rank)
            if message and message != self.told and process.returncode == EXIT_CODE:
                print(f"error: [rank {rank}] {message}", file=sys.stderr)

    def _ask_for_stacks(self) -> None:
        """Let each rank that still runs show its Python stacks: C code does it, whatever Python waits for."""
        for rank, process in enumerate(self.processes, self.first):
            if process.poll() is None:
                LOGGER.error("rank %d shows no stacks by itself:", rank)
                process.send_signal(signal.SIGUSR1)
                process.send_signal(signal.SIGCONT)  # in case it was stopped
                time.sleep(STACK_SECONDS)

    def kill(self) -> None:
        """Kill every rank that still runs, with all that it started.

        Does not wait for the end: a signal's handler that did would wait for ever when it interrupts
        ``Popen.wait``, whose lock is not reentrant.
        """
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill every rank that still runs, and wait for the end."""
        self.kill()
        for process in self.processes:
            process.wait()


def _how_it_ended(code: int) -> str:
    if code == HANG:
        return f"ended with exit status {code}: a rank hangs; every rank shows where it stands"
    if code > 0:
        return f"ended with exit status {code}; its message is above"
    hint = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was ended by {_signal_name(-code)}{hint}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name
