"""Which rank this process is, and with whom it works.

The context is handed to whoever needs it; there are no module-level process groups.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_lite.config.placement import axis_sizes, coordinates, groups_along
from megatron_lite.config.sections.parallel import ParallelSection


@dataclass(frozen=True)
class Axis:
    """One way in which the ranks share the work, as this rank sees it.

    Attributes:
        size: ranks along the axis, the degree.
        rank: this rank's place among them.
        group: their process group; None when they are all ranks of the run, or this one alone.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


ALONE = Axis()
"""The axis of a kind of parallelism that is not used."""


@dataclass(frozen=True)
class ParallelContext:
    """Ranks and groups of one process.

    Attributes:
        rank: global rank, 0 ≤ rank < world_size.
        world_size: number of ranks of the run.
        local_rank: rank within its machine; the index of its accelerator.
        device: where this rank computes.
        data: the ranks that share one global batch, each with samples of its own.
        tensor: the ranks that share every layer of one replica of the model.
        pipe: the ranks whose layers follow each other in one replica of the model.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    data: Axis = ALONE
    tensor: Axis = ALONE
    pipe: Axis = ALONE

    @property
    def data_rank(self) -> int:
        """Rank within the data-parallel group."""
        return self.data.rank

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.data.size

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that prints and writes shared files."""
        return self.rank == 0

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` (any shape) summed in place over the data-parallel ranks."""
        if self.data_size > 1:
            dist.all_reduce(value, group=self.data.group)
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


# Who sets which variables: torchrun, deepspeed and our launcher; SLURM's srun; the mpirun of OpenMPI and of
# MVAPICH; Hydra, which starts MPICH's and Intel's.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def context_from_environment() -> ParallelContext:
    """This process as its launcher set it: torchrun's variables, else SLURM's, else an MPI's, else one rank.

    Whatever the launcher, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in the
    environment afterwards, since torch and DeepSpeed look there. All ranks are data-parallel ones until
    :func:`arrange` says otherwise.
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
    return ParallelContext(rank, world_size, local_rank, device, data=Axis(world_size, rank))


def arrange(context: ParallelContext, parallel: ParallelSection) -> ParallelContext:
    """``context`` with its place on every axis that ``parallel`` asks for, and the groups made.

    Every rank calls this once the run's process group exists.
    """
    sizes = axis_sizes(parallel)
    place = coordinates(sizes, context.rank)

    def axis(name: str) -> Axis:
        return Axis(sizes[name], place[name], _group(groups_along(sizes, name), context.rank))

    return replace(context, pipe=axis("pipe"), data=axis("data"), tensor=axis("tensor"))


def _group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """The process group of ``rank`` among ``groups``; every rank makes every group, as torch asks."""
    if len(groups) == 1 or len(groups[0]) == 1:
        return None
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def _first_host(node_list: str) -> str:
    """The first host of SLURM's compressed list: ``gpu[03-05,09],login1`` → ``gpu03``; localhost if empty."""
    if not node_list:
        return "127.0.0.1"
    prefix, bracket, rest = node_list.partition("[")
    if not bracket or "," in prefix:
        return node_list.split(",")[0]
    return prefix + re.split(r"[-,\]]", rest)[0]
