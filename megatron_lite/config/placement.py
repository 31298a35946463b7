"""Which rank stands where: the ranks as a grid of pipeline stages, data replicas, context and tensor shards.

The tensor axis is the fastest, so that ranks that exchange activations in every layer are neighbours, within
one machine; then context, then data; pipeline stages, which send least, are the slowest. DeepSpeed's
``PipeModelDataParallelTopology(num_pp, num_mp, num_dp)`` numbers ranks the same way, with data and context
together as its data-parallel ranks.
"""

from __future__ import annotations

from math import prod

from megatron_lite.config.sections.parallel import ParallelSection

AXES = ("pipe", "data", "context", "tensor")
"""The axes of the grid, the slowest first."""

REPLICA_AXES = ("data", "context")
"""The axes along which ranks hold the same weights and see different tokens."""


def axis_sizes(parallel: ParallelSection) -> dict[str, int]:
    """The degree of each axis."""
    return {
        "pipe": max(parallel.pipe_parallel_size, 1),
        "data": parallel.data_parallel_size,
        "context": parallel.context_parallel_size,
        "tensor": parallel.model_parallel_size,
    }


def coordinates(sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Where ``rank`` stands on each axis.

    >>> coordinates({"pipe": 2, "data": 1, "context": 1, "tensor": 2}, 3)
    {'pipe': 1, 'data': 0, 'context': 0, 'tensor': 1}
    """
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, sizes[axis])
    return {axis: place[axis] for axis in AXES}


def groups_along(sizes: dict[str, int], *axes: str) -> list[list[int]]:
    """The groups of ranks that differ on ``axes`` only, each in the order of those axes.

    >>> groups_along({"pipe": 1, "data": 2, "context": 1, "tensor": 2}, "data")
    [[0, 2], [1, 3]]
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(prod(sizes.values())):
        place = coordinates(sizes, rank)
        groups.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
    return list(groups.values())


def expert_groups(sizes: dict[str, int], degree: int) -> list[list[int]]:
    """The groups of ``degree`` replicas, neighbours, over which the experts of a layer are divided.

    >>> expert_groups({"pipe": 1, "data": 4, "context": 1, "tensor": 1}, 2)
    [[0, 1], [2, 3]]
    """
    replicas = groups_along(sizes, *REPLICA_AXES)
    return [group[first : first + degree] for group in replicas for first in range(0, len(group), degree)]


def expert_replica_groups(sizes: dict[str, int], degree: int) -> list[list[int]]:
    """The groups of ranks that hold the same experts.

    >>> expert_replica_groups({"pipe": 1, "data": 4, "context": 1, "tensor": 1}, 2)
    [[0, 2], [1, 3]]
    """
    replicas = groups_along(sizes, *REPLICA_AXES)
    return [group[first::degree] for group in replicas for first in range(degree)]


def groups_by_axis(parallel: ParallelSection) -> dict[str, list[list[int]]]:
    """The groups of every axis of a :class:`megatron_lite.parallel.context.ParallelContext`, by name."""
    sizes, experts = axis_sizes(parallel), parallel.expert_parallel_size
    return {axis: groups_along(sizes, axis) for axis in AXES} | {
        "replicas": groups_along(sizes, *REPLICA_AXES),
        "expert": expert_groups(sizes, experts),
        "expert_replicas": expert_replica_groups(sizes, experts),
    }
