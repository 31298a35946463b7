"""The command that starts the ranks of several hosts through SLURM: ``srun``.

Not DeepSpeed's runner (0.19.8), which leaves the placing to srun: outside of a job all ranks were on the
first host that had the cores, and one that had died did not end the others.
"""

from __future__ import annotations

import shlex
import shutil
import signal
from collections.abc import Mapping, Sequence

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.resources import Resources
from megatron_lite.utils.errors import ConfigError

STOP = signal.SIGUSR2
"""What srun hands on, and waits for; at a SIGINT or SIGTERM it kills its tasks."""

KILL = signal.SIGTERM


def slurm_command(
    keys: LauncherSection, resources: Resources, command: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """The words that run ``command`` as every rank of ``resources``, consecutive ranks on the same host.

    srun takes the hosts in an order of its own, and hands on all of ``environment``. ``launcher_args`` come
    last, so that they win.

    Raises:
        ConfigError: srun is not installed, or would have to start other numbers of ranks on some hosts, or
            to pick slots of a host by number.
    """
    if shutil.which("srun") is None:
        raise ConfigError("launcher slurm: srun is not installed, or not in PATH")
    ranks_each = len(next(iter(resources.hosts.values())))
    for host, slots in resources.hosts.items():
        if list(slots) != list(range(ranks_each)):
            raise ConfigError(
                f"launcher slurm starts {ranks_each} ranks on every host, by their number; {host} has slots "
                f"{list(slots)}: include and exclude whole hosts, or say num_gpus"
            )
    options = {
        "nodes": str(len(resources.hosts)),
        "nodelist": ",".join(resources.hosts),
        "ntasks": str(resources.ranks),
        "ntasks-per-node": str(ranks_each),
        "distribution": "block",
        "kill-on-bad-exit": "1",
        "export": "ALL",  # a job of `sbatch --export=NONE` has srun withhold even MASTER_PORT
        # Since Slurm 22.05 srun does not take the job's by itself, and a task would have one core.
        "cpus-per-task": environment.get("SLURM_CPUS_PER_TASK"),
        "comment": keys.comment,
        "account": keys.account,
    }
    words = [f"--{name}={value}" for name, value in options.items() if value]
    return ["srun", *words, *shlex.split(keys.launcher_args or ""), *command]


def meeting_point(keys: LauncherSection) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, as far as keys say; the ranks find the first host of their step."""
    named = {"MASTER_ADDR": keys.master_addr, "MASTER_PORT": keys.master_port}
    return {name: str(value) for name, value in named.items() if value is not None}
