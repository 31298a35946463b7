"""Which rank stands where: the ranks as a grid of pipeline stages, data replicas and tensor shards.

The tensor axis is the fastest, so that ranks that exchange activations in every layer are neighbours, within
one machine; then data; pipeline stages, which send least, are the slowest. DeepSpeed's
``PipeModelDataParallelTopology(num_pp, num_mp, num_dp)`` numbers ranks the same way.
"""

from __future__ import annotations

from megatron_lite.config.sections.parallel import ParallelSection

AXES = ("pipe", "data", "tensor")
"""The axes of the grid, the slowest first."""


def axis_sizes(parallel: ParallelSection) -> dict[str, int]:
    """The degree of each axis."""
    return {
        "pipe": max(parallel.pipe_parallel_size, 1),
        "data": parallel.data_parallel_size,
        "tensor": parallel.model_parallel_size,
    }


def coordinates(sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Where ``rank`` stands on each axis.

    >>> coordinates({"pipe": 2, "data": 1, "tensor": 2}, 3)
    {'pipe': 1, 'data': 0, 'tensor': 1}
    """
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, sizes[axis])
    return {axis: place[axis] for axis in AXES}


def groups_along(sizes: dict[str, int], axis: str) -> list[list[int]]:
    """The groups of ranks that differ on ``axis`` only, each in the order of that axis.

    >>> groups_along({"pipe": 1, "data": 2, "tensor": 2}, "data")
    [[0, 2], [1, 3]]
    """
    stride = 1
    for faster in AXES[AXES.index(axis) + 1 :]:
        stride *= sizes[faster]
    world = sizes["pipe"] * sizes["data"] * sizes["tensor"]
    firsts = [rank for rank in range(world) if coordinates(sizes, rank)[axis] == 0]
    return [[first + number * stride for number in range(sizes[axis])] for first in firsts]
