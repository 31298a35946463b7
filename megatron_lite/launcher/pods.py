"""The place of a pod in a Kubernetes job: its environment variables, from whoever set them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.utils.errors import ConfigError

DEFAULT_PORT = 29500
"""Where the ranks of several machines meet when nobody names a port (torch's default, too)."""

ADDRESS = ("PET_MASTER_ADDR", "MASTER_ADDR")
PORT = ("PET_MASTER_PORT", "MASTER_PORT")
COUNT = ("PET_NNODES", "NNODES", "WORLD_SIZE")
INDEX = ("PET_NODE_RANK", "NODE_RANK", "JOB_COMPLETION_INDEX", "RANK")
RANKS_EACH = ("PET_NPROC_PER_NODE", "NPROC_PER_NODE")
CHOSEN_THERE = ("auto", "gpu", "cpu")
"""Values of RANKS_EACH that leave the number to what is found in the pod."""


@dataclass(frozen=True)
class Pods:
    """The pods of a job, as one of them sees it.

    Attributes:
        count: pods of the job.
        index: this one among them, from 0.
        address: where all ranks meet: a name of pod 0.
        port: the port there.
        ranks_each: ranks that the job asks for in every pod; None when it leaves that open.
    """

    count: int
    index: int
    address: str
    port: int
    ranks_each: int | None


def pods_from_environment(environment: Mapping[str, str]) -> Pods | None:
    """The job that ``environment`` describes; None when it describes none, or one of a single pod.

    Kubeflow's operators (PyTorchJob, TrainJob) set torchrun's variables ``PET_*``, and older ones RANK and
    WORLD_SIZE, which count pods; an Indexed Job sets JOB_COMPLETION_INDEX, and its manifest the others.

    Raises:
        ConfigError: a variable is no number, or the numbers contradict each other.
    """
    address = _first(environment, ADDRESS)
    count, index = _first(environment, COUNT), _first(environment, INDEX)
    if address is None or count is None or index is None:
        return None
    port = _first(environment, PORT)
    pods = Pods(
        _number(*count),
        _number(*index),
        address[1],
        _number(*port) if port else DEFAULT_PORT,
        _ranks_each(environment),
    )
    if pods.count <= 1:
        return None
    if pods.index >= pods.count:
        raise ConfigError(
            f"{index[0]} {pods.index} and {count[0]} {pods.count} do not go together: "
            "deepy.py needs this pod's number, from 0, and the number of pods"
        )
    return pods


def ranks_of_lone_pod(environment: Mapping[str, str]) -> int | None:
    """Ranks that a job of a single pod asks for; None for other jobs, and when it leaves that open.

    A single pod meets no other, so nobody need say where. Raises ConfigError for what is no number.
    """
    count = _first(environment, COUNT)
    return _ranks_each(environment) if count is not None and count[1] == "1" else None


def _ranks_each(environment: Mapping[str, str]) -> int | None:
    each = _first(environment, RANKS_EACH)
    return None if each is None or each[1] in CHOSEN_THERE else _number(*each)


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str] | None:
    """The first variable of ``names`` that is set, and its value."""
    return next(((name, environment[name]) for name in names if environment.get(name)), None)


def _number(name: str, value: str) -> int:
    if not value.isdigit():
        hint = "; a number of pods that changes is torchrun's job" if ":" in value else ""
        raise ConfigError(f"the environment variable {name} is {value!r}, not a number{hint}")
    return int(value)
