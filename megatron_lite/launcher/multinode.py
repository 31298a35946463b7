"""Starts the ranks of several hosts: over ssh, through SLURM or through MPI."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType

from megatron_lite.config.cli import COMMAND_VARIABLE, typed_command
from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher import slurm
from megatron_lite.launcher.local import FORWARDED, end_with_parent, hang_up_once
from megatron_lite.launcher.mpi import KILL, MPI_LAUNCHERS, STOP, environment_file, exported, mpi_command
from megatron_lite.launcher.pods import DEFAULT_PORT
from megatron_lite.launcher.resources import Resources
from megatron_lite.launcher.ssh import address_of, start_over_ssh
from megatron_lite.utils.log import LOGGER

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What may be left over in the shell; a rank would believe it before what MPI or SLURM says of its place."""


def start_on_hosts(keys: LauncherSection, resources: Resources, script: str, arguments: Sequence[str]) -> int:
    """Run ``script arguments`` as the ranks of ``resources``; return the exit status of the run.

    SIGINT and SIGTERM are passed on to the launcher. Raises ConfigError when the launcher is not installed,
    cannot do what is asked, or does not reach the first host.
    """
    os.environ[COMMAND_VARIABLE] = typed_command()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of sockets whose other side has no name
    command = [sys.executable, "-u", script, *arguments]
    if keys.launcher == "slurm":
        return _start_with_slurm(keys, resources, command)
    host, port = _meeting_point(keys, resources)
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))  # MPI hands them on
    if keys.launcher in MPI_LAUNCHERS:
        return _start_with_mpi(keys, resources, command)
    environment = {**os.environ, **environment_file()}
    variables = {name: environment[name] for name in exported(environment)}
    return start_over_ssh(keys, resources, command, variables, (host, port))


def _meeting_point(keys: LauncherSection, resources: Resources) -> tuple[str, int]:
    """Host and port where the ranks meet. Those of SLURM find their first host by themselves."""
    host = keys.master_addr or resources.first_host
    if keys.launcher == "pdsh" and not keys.master_addr and not keys.no_ssh_check:
        host = address_of(next(iter(resources.hosts)), keys)
    return host, keys.master_port or DEFAULT_PORT


def _start_with_mpi(keys: LauncherSection, resources: Resources, command: Sequence[str]) -> int:
    environment = {**os.environ, **environment_file()}
    words = mpi_command(keys, resources, command, environment)
    LOGGER.info("%s", shlex.join(words))
    launcher = _HostLauncher(words, environment, STOP.get(keys.launcher), KILL[keys.launcher])
    return launcher.wait()


def _start_with_slurm(keys: LauncherSection, resources: Resources, command: Sequence[str]) -> int:
    environment = {**os.environ, **environment_file(), **slurm.meeting_point(keys)}
    words = slurm.slurm_command(keys, resources, command, environment)
    LOGGER.info("%s", shlex.join(words))
    return _HostLauncher(words, environment, slurm.STOP, slurm.KILL).wait()


class _HostLauncher(subprocess.Popen[bytes]):
    """mpirun or srun.

    Signals are passed on, so that none is left behind: the first one as ``stop``, further ones as ``kill``,
    if these are given. An end by signal n becomes the exit status 128 + n.
    """

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stop: signal.Signals | None = None,
        kill: signal.Signals | None = None,
    ) -> None:
        self.early: list[signal.Signals] = []
        self.stop, self.kill_by = stop, kill
        for number in FORWARDED:
            # What is ignored stays so (nohup).
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._pass_on)
        # In a session of its own, a terminal's Ctrl-C reaches it once, through us: two would end srun. There,
        # no job control keeps it from reading what is typed at the shell.
        super().__init__(
            words,
            env={name: value for name, value in env.items() if name not in PLACE},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, stop or signal.SIGTERM),  # safe: this process has no threads
        )
        for each in self.early:
            self.send_signal(each)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        hang_up_once()
        sent = self.stop or FORWARDED[signal.Signals(number)]
        self.stop = self.kill_by
        LOGGER.warning("%s is passed on to the launcher of the hosts", signal.Signals(number).name)
        if getattr(self, "pid", None) is None:  # is about to be started
            self.early.append(sent)
        else:
            self.send_signal(sent)

    def wait(self, timeout: float | None = None) -> int:
        """As Popen's, with 128 + n for an end by signal n."""
        status = super().wait(timeout)
        self.returncode = 128 - status if status < 0 else status
        return self.returncode
