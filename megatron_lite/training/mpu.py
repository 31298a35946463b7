"""The parallel context as DeepSpeed's plain engine asks for it: its ``mpu`` ("model parallel unit")."""

from __future__ import annotations

import torch.distributed as dist

from megatron_lite.parallel.context import Axis, ParallelContext


class TensorDataMpu:
    """Ranks of the tensor axis as DeepSpeed's model-parallel ones, beside the data-parallel ones."""

    def __init__(self, context: ParallelContext) -> None:
        """Every rank makes one at the same time."""
        self._tensor, self._data = context.tensor, context.replicas
        self._tensor_group = process_group(context.tensor, context.rank)
        self._data_group = process_group(context.replicas, context.rank)

    def get_model_parallel_rank(self) -> int:
        """This rank's place on the tensor axis."""
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """The tensor axis' size."""
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share each layer."""
        return self._tensor_group

    def get_data_parallel_rank(self) -> int:
        """This rank's place among the replicas."""
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        """The number of replicas."""
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of the model."""
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(self._data_group)


def process_group(axis: Axis, rank: int) -> dist.ProcessGroup:
    """The axis' group, a real one where the axis has none: DeepSpeed takes None for all ranks of the run."""
    if axis.group is not None:
        return axis.group
    if axis.size == 1:
        return dist.new_group([rank], use_local_synchronization=True)
    world = dist.group.WORLD
    assert world is not None
    return world
