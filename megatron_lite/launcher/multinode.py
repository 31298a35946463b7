"""Starts the ranks of several hosts: through DeepSpeed's runner (pdsh), SLURM or MPI."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, SimpleNamespace

from megatron_lite.config.cli import COMMAND_VARIABLE, typed_command
from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher import slurm
from megatron_lite.launcher.local import FORWARDED
from megatron_lite.launcher.mpi import KILL, MPI_LAUNCHERS, STOP, environment_file, mpi_command
from megatron_lite.launcher.pods import DEFAULT_PORT
from megatron_lite.launcher.resources import Resources
from megatron_lite.utils.errors import ConfigError
from megatron_lite.utils.log import LOGGER

EXPORTED = ("NCCL", "GLOO")
"""Variables that begin so reach all hosts, beside those of DeepSpeed's runner (MLFLOW, PYTHON, MV2, UCX): it
adds NCCL only where it runs beside a GPU, and a login node has none."""


def start_on_hosts(keys: LauncherSection, resources: Resources, script: str, arguments: Sequence[str]) -> int:
    """Run ``script arguments`` as the ranks of ``resources``; return the exit status of the run.

    SIGINT and SIGTERM are passed on to the launcher. Raises ConfigError when DeepSpeed's runner refuses: its
    launcher is not installed, or a host cannot be reached; and as :func:`mpi_command` does.
    """
    os.environ[COMMAND_VARIABLE] = typed_command()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of sockets whose other side has no name
    command = [sys.executable, "-u", script, *arguments]
    if keys.launcher == "slurm":
        return _start_with_slurm(keys, resources, command)
    # Launchers that hand on the environment tell the ranks so where they meet.
    os.environ.update(MASTER_ADDR=_meeting_host(keys, resources), MASTER_PORT=str(_port(keys)))
    if keys.launcher in MPI_LAUNCHERS:
        return _start_with_mpi(keys, resources, command)
    from deepspeed.launcher import runner

    runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _HostLauncher})
    runner.EXPORT_ENVS = sorted({*runner.EXPORT_ENVS, *EXPORTED})
    try:
        runner.main(runner_arguments(keys, resources, script, arguments))
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"launcher {keys.launcher}: {error}") from error
    return 0


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
    """pdsh, mpirun or srun as DeepSpeed's runner starts it and waits for it, with two things it leaves out.

    Signals are passed on (the runner does that for pdsh only, by handlers that it sets afterwards), so that
    no mpirun is left behind: the first one as ``stop``, further ones as ``kill``, if these are given. And an
    end by signal n becomes the exit status 128 + n, where the runner, which looks for positive ones, would
    end with 0.
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
            # What is ignored stays so (nohup), and so do the runner's handlers when it starts a second pdsh.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._pass_on)
        # In a session of its own, a terminal's Ctrl-C reaches it once, through us: two would end srun.
        super().__init__(words, env=env, start_new_session=True)
        for each in self.early:
            self.send_signal(each)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
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


def runner_arguments(
    keys: LauncherSection, resources: Resources, script: str, arguments: Sequence[str]
) -> list[str]:
    """The command line of DeepSpeed's runner (``deepspeed``) that starts ``script`` as ``keys`` say."""
    assert resources.hostfile is not None, "several hosts come from a hostfile"
    options = {
        "hostfile": resources.hostfile,
        "include": keys.include,
        "exclude": keys.exclude,
        "num_nodes": keys.num_nodes if keys.num_nodes > 0 else None,
        "num_gpus": keys.num_gpus,
        "master_port": _port(keys),
        "master_addr": keys.master_addr,
        "launcher": keys.launcher,
        "launcher_args": keys.launcher_args or None,
    }
    flags = {"no_ssh_check": keys.no_ssh_check, "force_multi": keys.force_multi}
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    words += [f"--{name}" for name, is_set in flags.items() if is_set]
    return [*words, "--no_local_rank", script, *(_for_remote_shell(word) for word in arguments)]


def _meeting_host(keys: LauncherSection, resources: Resources) -> str:
    return keys.master_addr or next(iter(resources.hosts))


def _port(keys: LauncherSection) -> int:
    return keys.master_port or DEFAULT_PORT


def _for_remote_shell(word: str) -> str:
    """``word`` so that the shell on the other host reads it as one; DeepSpeed quotes those with spaces."""
    return word if " " in word else shlex.quote(word)
