"""Whether the ranks that talk most are on one machine."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lite.config import Config
from megatron_lite.config.cli import is_launched
from megatron_lite.config.placement import axis_sizes, groups_along
from megatron_lite.utils.log import LOGGER

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def tell_of_torn_groups(config: Config, hosts: Mapping[str, int]) -> None:
    """Warn when a tensor-parallel group has ranks on more than one of ``hosts`` (host → number of its ranks).

    Consecutive ranks form a group, so that each stays within one host if the degree divides the ranks of
    every host. It works without, but the network carries activations several times in each layer.
    """
    degree = config.parallel.model_parallel_size
    home = [host for host, ranks in hosts.items() for _ in range(ranks)]
    for group in groups_along(axis_sizes(config.parallel), "tensor"):
        first, last = home[group[0]], home[group[-1]]
        if first != last:
            LOGGER.warning(
                "model_parallel_size %d does not divide the ranks of each host (%s): ranks %d to %d exchange "
                "activations between %s and %s in every layer, which is slow: choose a degree that does.",
                degree, ", ".join(map(str, sorted(set(hosts.values())))), group[0], group[-1], first, last,
            )  # fmt: skip
            return


def own_machine() -> tuple[str, str]:
    """The machine of this process: what tells it from all others, and its host name.

    Containers and pods of one machine have names of their own, and those of several machines may share one:
    the kernel's boot id is one for each machine that runs (Linux; elsewhere the name has to do).
    """
    name = socket.gethostname()
    return (BOOT_ID.read_text().strip() if BOOT_ID.exists() else name), name


def tell_of_actual_machines(config: Config, machines: Sequence[tuple[str, str]]) -> None:
    """:func:`tell_of_torn_groups`, once every rank has told its :func:`own_machine`: ``machines``, by rank.

    Whoever started the ranks may have dealt them out to the hosts in turn, and so torn every group.
    """
    names: dict[str, str] = {}
    for machine, name in machines:
        names.setdefault(machine, f"{name} ({len(names) + 1})" if name in names.values() else name)
    home = [names[machine] for machine, _ in machines]
    hosts = Counter(home)
    if home == list(hosts.elements()):
        if not is_launched():  # deepy.py has told before it started them
            tell_of_torn_groups(config, hosts)
        return
    for group in groups_along(axis_sizes(config.parallel), "tensor"):
        torn_over = list(dict.fromkeys(home[rank] for rank in group))
        if len(torn_over) > 1:
            LOGGER.warning(
                "consecutive ranks are on different hosts: ranks %d to %d exchange activations between %s in "
                "every layer (model_parallel_size), which is slow: have the launcher fill one host after the "
                "other (srun --distribution=block, mpirun --map-by slot, mpiexec.hydra -ppn NUMBER).",
                group[0], group[-1], " and ".join(torn_over[:2]),
            )  # fmt: skip
            return
