"""Starts the ranks of several hosts through DeepSpeed's runner (pdsh, OpenMPI, MPICH, Intel MPI, SLURM)."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.pods import DEFAULT_PORT
from megatron_lite.launcher.resources import Resources
from megatron_lite.utils.errors import ConfigError


def start_on_hosts(keys: LauncherSection, resources: Resources, script: str, arguments: Sequence[str]) -> int:
    """Run ``script arguments`` as the ranks of ``resources``; return the exit status of the run.

    Raises ConfigError when DeepSpeed's runner refuses: its launcher is not installed, or a host cannot be
    reached.
    """
    from deepspeed.launcher import runner

    # Launchers that hand on the environment (SLURM's srun) tell the ranks so where they meet.
    os.environ.update(MASTER_ADDR=_meeting_host(keys, resources), MASTER_PORT=str(_port(keys)))
    try:
        runner.main(runner_arguments(keys, resources, script, arguments))
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"launcher {keys.launcher}: {error}") from error
    return 0


def runner_arguments(
    keys: LauncherSection, resources: Resources, script: str, arguments: Sequence[str]
) -> list[str]:
    """The command line of DeepSpeed's runner (``deepspeed``) that starts ``script`` as ``keys`` say.

    MPI has no ssh through which DeepSpeed could ask the first host for its address, so there its name in the
    hostfile is the meeting point, unless ``master_addr`` names another.
    """
    assert resources.hostfile is not None, "several hosts come from a hostfile"
    options = {
        "hostfile": resources.hostfile,
        "include": keys.include,
        "exclude": keys.exclude,
        "num_nodes": keys.num_nodes if keys.num_nodes > 0 else None,
        "num_gpus": keys.num_gpus,
        "master_port": _port(keys),
        "master_addr": keys.master_addr if keys.launcher == "pdsh" else _meeting_host(keys, resources),
        "launcher": keys.launcher,
        "launcher_args": _launcher_arguments(keys, resources) or None,
    }
    flags = {"no_ssh_check": keys.no_ssh_check or keys.launcher != "pdsh", "force_multi": keys.force_multi}
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    words += [f"--{name}" for name, is_set in flags.items() if is_set]
    quoted = [_for_remote_shell(word) for word in arguments] if keys.launcher == "pdsh" else list(arguments)
    return [*words, "--no_local_rank", script, *quoted]


def _meeting_host(keys: LauncherSection, resources: Resources) -> str:
    return keys.master_addr or next(iter(resources.hosts))


def _port(keys: LauncherSection) -> int:
    return keys.master_port or DEFAULT_PORT


def _launcher_arguments(keys: LauncherSection, resources: Resources) -> str:
    """``launcher_args`` and what this launcher needs beside what DeepSpeed gives it, in one string."""
    words = [keys.launcher_args] if keys.launcher_args else []
    flag = {"openmpi": "-x", "mvapich": "-env"}.get(keys.launcher)
    if flag is not None:
        host = _meeting_host(keys, resources)
        words += [f"{flag} MASTER_ADDR={host}", f"{flag} MASTER_PORT={_port(keys)}"]
    if keys.launcher == "slurm":
        words += [f"--{key}={shlex.quote(value)}" for key, value in _slurm_options(keys) if value]
    return " ".join(words)


def _slurm_options(keys: LauncherSection) -> list[tuple[str, str | None]]:
    return [("comment", keys.comment), ("account", keys.account)]


def _for_remote_shell(word: str) -> str:
    """``word`` so that the shell on the other host reads it as one; DeepSpeed quotes those with spaces."""
    return word if " " in word else shlex.quote(word)
