"""Starts the ranks of several hosts over ssh, watches the hosts, and stops them together.

Not DeepSpeed's runner (0.19.8): with it a Ctrl-C ended pdsh, and what the ranks still said, at once; a host
that ssh does not reach left the others waiting; and its launcher on each host kills ranks half a minute after
a SIGTERM, whether they have saved or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.host import HostOrder
from megatron_lite.launcher.local import (
    FORWARDED,
    GRACE_SECONDS,
    PAUSE_SECONDS,
    POLL_SECONDS,
    hang_up_once,
    receiving_signals,
)
from megatron_lite.launcher.resources import Resources
from megatron_lite.utils.errors import HANG, LOST_RANK, ConfigError
from megatron_lite.utils.log import LOGGER

PROJECT = Path(__file__).resolve().parents[2]
OPTIONS = tuple(
    word
    for option in (
        "BatchMode=yes", "ConnectTimeout=30", "ConnectionAttempts=3", "ServerAliveInterval=15",
        "ServerAliveCountMax=8", "RequestTTY=no", "ForwardX11=no", "ForwardAgent=no",
    )
    for word in ("-o", option)
)  # fmt: skip
"""No question for a password: nobody may be there, and standard input is taken. A host that is silent for two
minutes is lost: its network or its power has failed. A terminal, which the user's settings may ask for,
would take the orders for typed text."""

BROKEN_SECONDS = 60.0
"""How long ranks may take to save and end when none of them has failed, but a connection or the launcher."""

SSH_FAILED = 255
HOST_PROGRAM = "import sys; from megatron_lite.launcher.host import main; sys.exit(main())"


def start_over_ssh(
    keys: LauncherSection,
    resources: Resources,
    command: Sequence[str],
    variables: Mapping[str, str],
    meeting: tuple[str, int],
) -> int:
    """Run ``command`` as every rank of ``resources``, with ``variables``; return the exit status of the run.

    The ranks meet at ``meeting``, host and port. The status is 0 when all hosts end with 0, also after a
    SIGINT or SIGTERM, which reach the ranks so that they can save (a second one kills). When a host ends
    otherwise, the others are ended within seconds and its status is returned. Raises ConfigError when
    ``launcher_args`` has an option that would hide the end of ssh.
    """
    group = _Hosts(_ssh(keys), list(resources.hosts))
    first = 0
    with receiving_signals(group.receive):
        try:
            for name, slots in resources.hosts.items():
                group.start(
                    HostOrder(
                        name, command, dict(variables), list(slots), resources.chosen, first, resources.ranks,
                        *meeting,
                    )
                )  # fmt: skip
                first += len(slots)
            return group.wait()
        finally:
            group.close()


def _ssh(keys: LauncherSection) -> list[str]:
    return ["ssh", *_own_options(keys), *OPTIONS]


def _own_options(keys: LauncherSection) -> list[str]:
    """The user's options of ssh, also those that pdsh would have read. ssh lets the first of a kind win."""
    words = shlex.split(keys.launcher_args or "") + shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    if "-f" in words:
        raise ConfigError(
            "launcher_args: launcher pdsh gives its arguments to ssh, which -f puts into the background: "
            "leave out -f (pdsh's own number of connections; here all hosts are connected at once)"
        )
    return words


def address_of(host: str, keys: LauncherSection) -> str:
    """The first address of ``host`` as the host itself says, which other hosts may reach by no other name.

    Raises ConfigError when ssh does not reach it, or is not installed.
    """
    try:
        asked = subprocess.run(
            [*_ssh(keys), host, "hostname", "-I"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise ConfigError("launcher pdsh: ssh is not installed, or not in PATH") from None
    if asked.returncode:
        raise ConfigError(f"host {host} is not reached by ssh without a password: {asked.stderr.strip()}")
    return (asked.stdout.split() or [host])[0]


class _Hosts:
    """The hosts of a run, each an ssh that tells its host what to do."""

    def __init__(self, ssh: Sequence[str], names: Sequence[str]) -> None:
        self.ssh = ssh
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # Filled by a signal's handler: only operations that it cannot interrupt halfway.
        self.untold: dict[str, deque[signal.Signals]] = {name: deque() for name in names}
        self.told: list[float] = []

    def start(self, order: HostOrder) -> None:
        path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = ["env", f"PYTHONPATH={path}", sys.executable, "-u", "-c", HOST_PROGRAM]
        remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
        # In a session of its own, a terminal's Ctrl-C does not cut the connection.
        process = subprocess.Popen(
            [*self.ssh, order.name, remote], stdin=subprocess.PIPE, start_new_session=True
        )
        self._tell(process, json.dumps(asdict(order)))
        self.processes[order.name] = process
        self._tell_signals()  # that came before

    @staticmethod
    def _tell(process: subprocess.Popen[bytes], line: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # has ended, or is closed
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Hand a signal on to all hosts."""
        hang_up_once()
        self._tell_all(FORWARDED[signal.Signals(number)])

    def _tell_all(self, number: signal.Signals) -> None:
        self.told.append(time.monotonic())
        for signals in self.untold.values():
            signals.append(number)
        self._tell_signals()

    def _tell_signals(self) -> None:
        for name, process in tuple(self.processes.items()):
            with contextlib.suppress(IndexError):  # no more
                while True:
                    self._tell(process, self.untold[name].popleft().name)

    def _runs(self) -> bool:
        return None in [process.poll() for process in self.processes.values()]

    def wait(self) -> int:
        """Wait until every host has ended, ending the others when one fails; return the run's exit status."""
        status, began, grace, lost_since = 0, 0.0, GRACE_SECONDS, 0.0
        while self._runs():
            time.sleep(POLL_SECONDS)
            failed = self._failed()
            lost_since = lost_since or (time.monotonic() if failed else 0.0)
            if not status and failed:
                # A host whose ranks have only lost others is not at fault: the other's end is seen later.
                is_late = time.monotonic() > lost_since + 2 * GRACE_SECONDS
                status = self._named(failed, is_late)
                began = time.monotonic() + (2 * GRACE_SECONDS if status == HANG else PAUSE_SECONDS)
                grace = BROKEN_SECONDS if status == SSH_FAILED else GRACE_SECONDS
            told = len(self.told)
            if status and told < 2 and time.monotonic() > began + told * grace:
                self._tell_all(signal.SIGTERM)  # the second one kills
            if told > 1 and time.monotonic() > self.told[1] + GRACE_SECONDS:
                self._kill()
        return status or self._named(self._failed(), all_have_ended=True)

    def _kill(self) -> None:
        """End the connections to hosts that do not answer: their ranks end by themselves, if they can."""
        for host, process in self.processes.items():
            if process.poll() is None:
                LOGGER.error("host %s does not end; look there for ranks that are left", host)
                process.kill()

    def _failed(self) -> dict[str, int]:
        return {host: process.returncode for host, process in self.processes.items() if process.returncode}

    def _named(self, failed: Mapping[str, int], all_have_ended: bool) -> int:
        """The exit status of the host at fault, named in the log; 0 if that is not known yet."""
        at_fault = {host: code for host, code in failed.items() if code != LOST_RANK}
        if all_have_ended:
            at_fault = at_fault or dict(failed)
        for host, code in at_fault.items():
            why = (
                "ssh could not connect, or the connection broke"
                if code == SSH_FAILED
                else "its message is above"
            )
            LOGGER.error("host %s ended with exit status %d; %s", host, code, why)
            return 128 - code if code < 0 else code
        return 0

    def close(self) -> None:
        """Leave no host alone: the end of its input lets its ranks save and end."""
        for process in self.processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        until = time.monotonic() + BROKEN_SECONDS
        while self._runs() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        self._kill()
        for process in self.processes.values():
            process.wait()
