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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.host import HostOrder
from megatron_lite.launcher.local import FORWARDED, GRACE_SECONDS, PAUSE_SECONDS, POLL_SECONDS, hang_up_once
from megatron_lite.launcher.pods import DEFAULT_PORT
from megatron_lite.launcher.resources import Resources
from megatron_lite.utils.errors import HANG, LOST_RANK, ConfigError
from megatron_lite.utils.log import LOGGER

PROJECT = Path(__file__).resolve().parents[2]
OPTIONS = tuple(
    word
    for option in ("BatchMode=yes", "ConnectTimeout=30", "ServerAliveInterval=15", "ServerAliveCountMax=8")
    for word in ("-o", option)
)
"""No question for a password: nobody may be there, and standard input is taken. A host that is silent for two
minutes is lost: its network or its power has failed."""

SSH_FAILED = 255
HOST_PROGRAM = "import sys; from megatron_lite.launcher.host import main; sys.exit(main())"


def start_over_ssh(
    keys: LauncherSection, resources: Resources, command: Sequence[str], variables: Mapping[str, str]
) -> int:
    """Run ``command`` as every rank of ``resources``, with ``variables``; return the exit status of the run.

    It is 0 when all hosts end with 0, also after a SIGINT or SIGTERM, which reach the ranks so that they can
    save (a second one kills). When a host ends otherwise, the others are ended within seconds and its status
    is returned. Raises ConfigError when the first host cannot be reached.
    """
    ssh = ["ssh", *shlex.split(keys.launcher_args or ""), *OPTIONS]
    first_host = next(iter(resources.hosts))
    address = keys.master_addr or (first_host if keys.no_ssh_check else _address(ssh, first_host))
    group = _Hosts(ssh)
    first = 0
    with group.receiving_signals():
        try:
            for name, slots in resources.hosts.items():
                group.start(
                    HostOrder(
                        name, command, dict(variables), list(slots), resources.chosen, first, resources.ranks,
                        address, keys.master_port or DEFAULT_PORT,
                    )
                )  # fmt: skip
                first += len(slots)
            return group.wait()
        finally:
            group.close()


def _address(ssh: Sequence[str], host: str) -> str:
    """The first address of ``host`` as the host itself says, which other hosts may reach by no other name."""
    try:
        asked = subprocess.run(
            [*ssh, host, "hostname", "-I"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise ConfigError("launcher pdsh: ssh is not installed, or not in PATH") from None
    if asked.returncode:
        raise ConfigError(f"host {host} is not reached by ssh without a password: {asked.stderr.strip()}")
    return (asked.stdout.split() or [host])[0]


class _Hosts:
    """The hosts of a run, each an ssh that tells its host what to do."""

    def __init__(self, ssh: Sequence[str]) -> None:
        self.ssh = ssh
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, order: HostOrder) -> None:
        path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = ["env", f"PYTHONPATH={path}", sys.executable, "-u", "-c", HOST_PROGRAM]
        remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
        # In a session of its own, a terminal's Ctrl-C does not cut the connection.
        process = subprocess.Popen(
            [*self.ssh, order.name, remote], stdin=subprocess.PIPE, start_new_session=True
        )
        self.processes[order.name] = process
        self._tell(process, json.dumps(asdict(order)))

    @staticmethod
    def _tell(process: subprocess.Popen[bytes], line: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # has ended
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()

    @contextlib.contextmanager
    def receiving_signals(self) -> Iterator[None]:
        """Within: signals are handed on to all hosts. A signal that was ignored stays so (nohup)."""
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
        hang_up_once()
        self._tell_all(FORWARDED[signal.Signals(number)])

    def _tell_all(self, number: signal.Signals) -> None:
        for process in self.processes.values():
            self._tell(process, number.name)

    def wait(self) -> int:
        """Wait until every host has ended, ending the others when one fails; return the run's exit status."""
        status, began, lost_since, told = 0, 0.0, 0.0, 0
        while None in [process.poll() for process in self.processes.values()]:
            time.sleep(POLL_SECONDS)
            failed = self._failed()
            lost_since = lost_since or (time.monotonic() if failed else 0.0)
            if not status and failed:
                # A host whose ranks have only lost others is not at fault: the other's end is seen later.
                is_late = time.monotonic() > lost_since + 2 * GRACE_SECONDS
                status = self._named(failed, is_late)
                began = time.monotonic() + (2 * GRACE_SECONDS if status == HANG else PAUSE_SECONDS)
            if status and told < 2 and time.monotonic() > began + told * GRACE_SECONDS:
                self._tell_all(signal.SIGTERM)  # the second one kills
                told += 1
        return status or self._named(self._failed(), all_have_ended=True)

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
        """Leave no host alone: the end of its input ends its ranks."""
        for process in self.processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
