"""The command that starts the ranks of several hosts through MPI: OpenMPI's ``mpirun``, or Hydra.

Hydra (``mpiexec.hydra``) is the process manager of MPICH, MVAPICH and Intel MPI. A rank makes no MPI call; it
only finds its place in the variables that they set.

Not DeepSpeed's runner (0.19.8), with which a run that lost a rank ended with 0 under MPICH: between Hydra and
each rank it puts a helper that drops the rank's exit status, and dies of the SIGTERM at which the rank saves.
It puts quotes into values, ties OpenMPI to an interface ``eth0``, and knows of MVAPICH only the GDR edition.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lite.config.cli import COMMAND_VARIABLE
from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.resources import Resources
from megatron_lite.utils.errors import ConfigError

HYDRA = ("mpich", "impi", "mvapich")
MPI_LAUNCHERS = ("openmpi", *HYDRA)

EXPORTED = ("GLOO", "MLFLOW", "MV2", "MVP", "NCCL", "OMP_", "PYTHON", "TORCH", "UCX")
"""Variables that begin so are handed to the ranks of other hosts. Hydra hands on all."""

STOP = {"openmpi": signal.SIGUSR2}
"""What such a launcher hands on, and waits for, where it would end its ranks at a SIGINT or SIGTERM."""

KILL = {"openmpi": signal.SIGTERM} | dict.fromkeys(HYDRA, signal.SIGINT)
"""What makes it end the ranks that have been asked to stop."""


def mpi_command(
    keys: LauncherSection, resources: Resources, command: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """The words that run ``command`` as every rank of ``resources``, consecutive ranks on the same host.

    ``environment`` is the one that they will be started with, with MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: the launcher is not installed, is another one, refuses to run as root, or cannot place
            the ranks so.
    """
    for host, slots in resources.hosts.items():
        if list(slots) != list(range(len(slots))):
            raise ConfigError(
                f"launcher {keys.launcher} starts ranks on a host by their number, not on its slots "
                f"{list(slots)}: include and exclude whole hosts ({host}), or say num_gpus"
            )
    own = shlex.split(keys.launcher_args or "")
    counts = {host: len(slots) for host, slots in resources.hosts.items()}
    words = [_program(keys.launcher), "-n", str(resources.ranks)]
    if keys.launcher == "openmpi":
        _check_root(own, environment)
        words += ["--host", ",".join(f"{host}:{count}" for host, count in counts.items())]
        # By default ranks are dealt out to sockets and tied to a core or a socket, data loading and all.
        for option, value in {"--map-by": "slot", "--bind-to": "none"}.items():
            words += [] if option in own else [option, value]
        for name in exported(environment):
            words += ["-x", name]
    else:
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"launcher {keys.launcher} starts as many ranks on every host, not {counts}: "
                "set num_gpus to the number that each host has"
            )
        words += ["-ppn", str(resources.ranks_here), "-hosts", ",".join(counts), "-genvall"]
    if keys.launcher == "impi":
        words += ["-genv", "I_MPI_PIN", "0"]
    return [*words, *own, *command]


def exported(environment: Mapping[str, str]) -> list[str]:
    """The names in ``environment`` of what reaches other hosts."""
    named = {"MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY", COMMAND_VARIABLE, *environment_file()}
    return sorted(name for name in environment if name in named or name.startswith(EXPORTED))


def environment_file() -> dict[str, str]:
    """The variables of DeepSpeed's files ``.deepspeed_env`` (NAME=VALUE lines), at home and here.

    Quotes around a value are taken off; comments, empty lines and a leading ``export`` count for nothing.

    Raises:
        ConfigError: a line is not of this kind, or has a ``$``, which no shell reads here.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [path for path in (Path.home() / name, Path(name)) if path.is_file()]
    lines = [(path, *each) for path in files for each in enumerate(path.read_text().splitlines(), 1)]
    entries = [_variable(line, f"{path}:{number}") for path, number, line in lines]
    return dict(entry for entry in entries if entry is not None)


def _variable(line: str, where: str) -> tuple[str, str] | None:
    line = line.strip().removeprefix("export ").strip()
    if not line or line.startswith("#"):
        return None
    name, equals, value = (part.strip() for part in line.partition("="))
    if not equals or not name.isidentifier():
        raise ConfigError(f"{where}: {line!r} is not a line NAME=VALUE")
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    if "$" in value and not (is_quoted and value[0] == "'"):
        raise ConfigError(
            f"{where}: {name} has a $, and no shell reads this file: write the value itself, or, "
            "if the $ is a part of it, put it in single quotes"
        )
    return name, value[1:-1] if is_quoted else value


def _program(launcher: str) -> str:
    """The program of ``launcher``: full path. Raises ConfigError when it is missing or another MPI's."""
    name = "mpirun" if launcher == "openmpi" else "mpiexec.hydra"  # Intel's mpirun keeps signals to itself
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"launcher {launcher}: {name} is not installed, or not in PATH")
    if launcher == "openmpi":
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if "Open MPI" not in version and "OpenRTE" not in version:
            raise ConfigError(
                f"launcher openmpi: {path} belongs to another MPI: put OpenMPI's first in PATH, "
                "or set launcher to mpich, impi or mvapich"
            )
    return path


def _check_root(own: Sequence[str], environment: Mapping[str, str]) -> None:
    variables = {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}
    is_allowed = "--allow-run-as-root" in own or all(environment.get(name) == "1" for name in variables)
    if os.geteuid() == 0 and not is_allowed:
        raise ConfigError(
            "launcher openmpi: OpenMPI runs as root only when told to: "
            "set the key launcher_args to --allow-run-as-root"
        )
