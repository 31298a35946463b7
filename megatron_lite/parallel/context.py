"""Which rank this process is, and with whom it works.

The context is handed to whoever needs it; there are no module-level process groups.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelContext:
    """Ranks and groups of one process.

    Attributes:
        rank: global rank, 0 ≤ rank < world_size.
        world_size: number of ranks of the run.
        local_rank: rank within its machine; the index of its accelerator.
        device: where this rank computes.
        data_rank: rank within the data-parallel group, which shares one global batch.
        data_size: number of data-parallel ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    data_rank: int
    data_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that prints and writes shared files."""
        return self.rank == 0

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` (any shape) summed in place over the data-parallel ranks."""
        if self.data_size > 1:
            dist.all_reduce(value)
        return value

    def broadcast_object(self, value: object) -> object:
        """Rank 0's ``value`` on every rank (pickled between our own processes only)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def context_from_environment() -> ParallelContext:
    """This process as its launcher set it (RANK, WORLD_SIZE, LOCAL_RANK); a single rank without them."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return ParallelContext(rank, world_size, local_rank, device, data_rank=rank, data_size=world_size)
