"""Which rank this process is, and with whom it works.

The context is handed to whoever needs it; there are no module-level process groups.
"""

from __future__ import annotations

import os
import re
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


# Who sets which variables: torchrun, deepspeed and our launcher; SLURM's srun; OpenMPI's mpirun.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def context_from_environment() -> ParallelContext:
    """This process as its launcher set it: torchrun's variables, else SLURM's, else OpenMPI's, else one rank.

    Whatever the launcher, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in the
    environment afterwards, since torch and DeepSpeed look there.
    """
    environment = os.environ
    started = [names for names in LAUNCHERS if names[0] in environment and names[1] in environment]
    rank, world_size, local_rank = (
        (int(environment.get(name, 0)) for name in started[0]) if started else (0, 1, 0)
    )
    environment.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    environment.setdefault("MASTER_ADDR", _first_host(environment.get("SLURM_JOB_NODELIST", "")))
    environment.setdefault("MASTER_PORT", "29500")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return ParallelContext(rank, world_size, local_rank, device, data_rank=rank, data_size=world_size)


def _first_host(node_list: str) -> str:
    """The first host of SLURM's compressed list: ``gpu[03-05,09],login1`` → ``gpu03``; localhost if empty."""
    if not node_list:
        return "127.0.0.1"
    prefix, bracket, rest = node_list.partition("[")
    if not bracket or "," in prefix:
        return node_list.split(",")[0]
    return prefix + re.split(r"[-,\]]", rest)[0]
