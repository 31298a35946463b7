"""Which rank this process is, and with whom it works.

The context is handed to whoever needs it; there are no module-level process groups.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.config.placement import groups_by_axis
from megatron_lite.config.sections.parallel import ParallelSection
from megatron_lite.utils.errors import ConfigError


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
        context: the ranks that share each sequence, each with some of its tokens.
        replicas: data and context ranks together: those with the same weights and other tokens. They are
            DeepSpeed's data-parallel ranks, which share gradients and what ZeRO partitions.
        expert: the replicas over which the experts of a layer are divided.
        expert_replicas: the replicas that hold the same experts.
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
    context: Axis = ALONE
    replicas: Axis = ALONE
    expert: Axis = ALONE
    expert_replicas: Axis = ALONE

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

    def sum_over_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` (any shape) summed in place over the ranks that see other tokens."""
        if self.replicas.size > 1:
            dist.all_reduce(value, group=self.replicas.group)
        return value

    def broadcast_object(self, value: object) -> object:
        """Rank 0's ``value`` on every rank (pickled between our own processes only)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def of_every_rank(self, value: Any) -> list[Any]:
        """The ``value`` of each rank, on every rank (pickled between our own processes only)."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
"""srun's tasks. SLURM_NTASKS counts those of the job: beside SLURM_PROCID=0, a batch script has it, too."""

CRAY = ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
"""HPE Cray's mpiexec (PALS). Hydra shares the first two with it: the third tells them apart."""

# Who sets which variables (rank, ranks, rank on its machine, ranks there): torchrun, deepspeed and our
# launcher; OpenMPI's mpirun and MVAPICH's mpirun_rsh (since 3.0; before), ahead of SLURM, in whose job they
# may run; SLURM's srun; Cray's mpiexec; Hydra, which starts MPICH's and Intel's; Kubernetes with one process
# in each pod: Kubeflow's torchrun variables, or an Indexed Job.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE", "MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    SLURM,
    CRAY,
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PET_NODE_RANK", "PET_NNODES", "", ""),
    ("NODE_RANK", "NNODES", "", ""),
    ("JOB_COMPLETION_INDEX", "NNODES", "", ""),
    ("JOB_COMPLETION_INDEX", "WORLD_SIZE", "", ""),
)
RANKS_OF_A_POD = "PET_NPROC_PER_NODE"


def context_from_environment() -> ParallelContext:
    """This process as its launcher set it: the first of :data:`LAUNCHERS` that did, else the only rank.

    Whatever the launcher, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in the
    environment afterwards, since torch and DeepSpeed look there, and LOCAL_WORLD_SIZE if it is known. All
    ranks are data-parallel ones until :func:`arrange` says otherwise.

    Raises:
        ConfigError: this is one process of a pod that is to run several ranks, or one of several hosts, of
            which nobody says where they meet.
    """
    environment = os.environ
    started = [
        names
        for names in LAUNCHERS
        if all(name in environment for name in names[: 3 if names == CRAY else 2])
    ]
    rank, world_size, local_rank = (
        (int(environment.get(name, 0)) for name in started[0][:3]) if started else (0, 1, 0)
    )
    ranks_of_pod = environment.get(RANKS_OF_A_POD, "")
    if "LOCAL_RANK" not in environment and ranks_of_pod.isdigit() and int(ranks_of_pod) > 1:
        raise ConfigError(
            f"this pod is to run {ranks_of_pod} ranks ({RANKS_OF_A_POD}), and train.py is only one: "
            "start them with `python deepy.py train.py ...` or `torchrun train.py ...`"
        )
    environment.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    local_size = started[0][3] if started else ""
    ranks_here = re.match(r"\d+", environment.get(local_size, "") if local_size else "1")
    if ranks_here:
        environment["LOCAL_WORLD_SIZE"] = ranks_here[0]
    hosts = _slurms_hosts(is_step=bool(started) and started[0] == SLURM)
    if ranks_here and int(ranks_here[0]) < world_size:
        _check_meeting_point(environment, hosts)
    environment.setdefault("MASTER_ADDR", environment.get("PET_MASTER_ADDR") or _first_host(hosts))
    environment.setdefault("MASTER_PORT", environment.get("PET_MASTER_PORT", "29500"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # SLURM's --gpus-per-task shows each rank its own GPU only, which is then its number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    return ParallelContext(
        rank, world_size, local_rank, device, data=Axis(world_size, rank), replicas=Axis(world_size, rank)
    )


def _check_meeting_point(environment: Mapping[str, str], hosts: str) -> None:
    if not (hosts or environment.get("MASTER_ADDR") or environment.get("PET_MASTER_ADDR")):
        raise ConfigError(
            "the ranks are on several hosts, and none knows where they meet: give all of them the variable "
            "MASTER_ADDR, the host of rank 0 (mpirun -x MASTER_ADDR=HOST, mpiexec -genv MASTER_ADDR HOST)"
        )


def arrange(context: ParallelContext, parallel: ParallelSection) -> ParallelContext:
    """``context`` with its place on every axis that ``parallel`` asks for, and the groups made.

    Every rank calls this once the run's process group exists.
    """
    made: dict[str, Axis] = {}

    def axis(name: str, groups: list[list[int]]) -> Axis:
        if name in TOLD_APART:
            return _with_group(groups, context.rank, always_a_group=True)
        # The same ranks share one process group, whatever they share it for.
        if str(groups) not in made:
            made[str(groups)] = _with_group(groups, context.rank)
        return made[str(groups)]

    axes: dict[str, Any] = {name: axis(name, groups) for name, groups in groups_by_axis(parallel).items()}
    return replace(context, **axes)


TOLD_APART = ("context", "expert")
"""Axes with process groups of their own, so that their traffic can be told apart from that of replicas."""


def axis_among(groups: list[list[int]], rank: int) -> Axis:
    """The place of ``rank`` in its one of ``groups``, without a process group."""
    own = next(group for group in groups if rank in group)
    return Axis(len(own), own.index(rank))


def _with_group(groups: list[list[int]], rank: int, always_a_group: bool = False) -> Axis:
    """:func:`axis_among` with its process group; every rank makes every one, as torch asks.

    All ranks of the run are torch's default group, unless there must be ``always_a_group`` for several ranks.
    """
    axis = axis_among(groups, rank)
    if axis.size == 1 or (len(groups) == 1 and not always_a_group):
        return axis
    made = [dist.new_group(ranks) for ranks in groups]
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    return replace(axis, group=own)


def _slurms_hosts(is_step: bool) -> str:
    """SLURM's list of the hosts of the ranks; empty without SLURM.

    A step that srun started may have fewer hosts than its job. mpirun's ranks are on hosts of the job: the
    step that they find themselves in is mpirun's own, another one on each side.
    """
    job = os.environ.get("SLURM_JOB_NODELIST", "")
    return os.environ.get("SLURM_STEP_NODELIST", job) if is_step else job


def _first_host(node_list: str) -> str:
    """The first host of SLURM's compressed list: ``gpu[03-05,09],login1`` → ``gpu03``; localhost if empty."""
    if not node_list:
        return "127.0.0.1"
    prefix, bracket, rest = node_list.partition("[")
    if not bracket or "," in prefix:
        return node_list.split(",")[0]
    return prefix + re.split(r"[-,\]]", rest)[0]
