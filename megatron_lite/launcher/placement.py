"""Whether the ranks that talk most are on one machine."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_lite.config import Config
from megatron_lite.config.placement import axis_sizes, groups_along
from megatron_lite.utils.log import LOGGER


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


def even_hosts(world_size: int, ranks_each: int) -> dict[str, int]:
    """Host → ranks, when only the number on this one is known: all alike, the last one has the rest."""
    count = -(-world_size // ranks_each)
    return {f"host {i}": min(ranks_each, world_size - i * ranks_each) for i in range(count)}
