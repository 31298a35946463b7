"""Who a process is under each launcher, and the command line of train.py and deepy.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.config.cli import parse_command_line
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.training.distributed import distributed
from megatron_lite.utils.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("SLURM_", "OMPI_", "MV2_", "MVP_", "PMI_", "MPI_", "PET_", "NNODES", "NODE_RANK", "JOB_")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name in NAMES or name.startswith(OTHERS):
            monkeypatch.delenv(name)
    for name in NAMES:  # so that what the code sets is undone afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {
            "SLURM_PROCID": "3",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
        },
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {
            "MV2_COMM_WORLD_RANK": "3",
            "MV2_COMM_WORLD_SIZE": "8",
            "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {
            "MVP_COMM_WORLD_RANK": "3",
            "MVP_COMM_WORLD_SIZE": "8",
            "MVP_COMM_WORLD_LOCAL_RANK": "1",
            "MVP_COMM_WORLD_LOCAL_SIZE": "2",
            "PMI_ID": "3",
        },
        {"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"},
        {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    ],
)
def test_launchers(variables: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setenv("MASTER_ADDR", "first")
    context = context_from_environment()
    assert (context.rank, context.world_size, context.local_rank) == (3, 8, 1)
    assert (context.data_rank, context.data_size) == (3, 8)
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "8", "1"]
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert os.environ["MASTER_ADDR"] == "first"


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "job-0", "MASTER_PORT": "4000"},
        {
            "PET_NODE_RANK": "3",
            "PET_NNODES": "8",
            "PET_NPROC_PER_NODE": "1",
            "PET_MASTER_ADDR": "job-0",
            "PET_MASTER_PORT": "4000",
            "JOB_COMPLETION_INDEX": "3",
        },
        {"JOB_COMPLETION_INDEX": "3", "NNODES": "8", "MASTER_ADDR": "job-0", "MASTER_PORT": "4000"},
        {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "job-0", "MASTER_PORT": "4000"},
        {"NODE_RANK": "3", "NNODES": "8", "MASTER_ADDR": "job-0", "MASTER_PORT": "4000"},
    ],
)
def test_one_process_in_each_pod(variables: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    context = context_from_environment()
    assert (context.rank, context.world_size, context.local_rank) == (3, 8, 0)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("job-0", "4000")


def test_one_process_of_a_pod_that_is_to_run_several(environment: pytest.MonkeyPatch) -> None:
    """Kubeflow: WORLD_SIZE counts ranks, RANK counts pods. torchrun and deepy.py set LOCAL_RANK."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "2"}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=r"2 ranks \(PET_NPROC_PER_NODE\).*deepy.py"):
        context_from_environment()
    environment.setenv("LOCAL_RANK", "1")
    assert context_from_environment().local_rank == 1


def test_one_process_without_a_launcher(environment: pytest.MonkeyPatch) -> None:
    context = context_from_environment()
    assert (context.rank, context.world_size, context.is_first) == (0, 1, True)


def test_torchrun_wins_over_the_slurm_job_it_runs_in(environment: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    for name, value in {**slurm, "RANK": "5", "WORLD_SIZE": "16"}.items():
        environment.setenv(name, value)
    assert context_from_environment().rank == 5


def test_mpirun_wins_over_the_slurm_job_it_runs_in(environment: pytest.MonkeyPatch) -> None:
    """mpirun starts its helper on the second host as a step of one task there, which its ranks inherit."""
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    hosts = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_STEP_NODELIST": "node2"}
    for name, value in {**mpi, **slurm, **hosts}.items():
        environment.setenv(name, value)
    context = context_from_environment()
    assert (context.rank, context.world_size, context.local_rank) == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "node1"


@pytest.mark.parametrize(
    "interactive_step", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node1"}]
)
def test_a_program_in_a_batch_script_or_shell_of_slurm_is_alone(
    interactive_step: dict[str, str], environment: pytest.MonkeyPatch
) -> None:
    """Variables as Slurm 22.05 sets them outside of srun, in a job of two times two tasks."""
    job = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
    for name, value in {**job, **interactive_step}.items():
        environment.setenv(name, value)
    context = context_from_environment()
    assert (context.rank, context.world_size) == (0, 1)


def test_a_step_on_some_hosts_of_its_job(environment: pytest.MonkeyPatch) -> None:
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    hosts = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_STEP_NODELIST": "node2"}
    for name, value in {**task, **hosts}.items():
        environment.setenv(name, value)
    context_from_environment()
    assert os.environ["MASTER_ADDR"] == "node2"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,09],login1", "gpu03"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("n[2,4]", "n2"),
        ("a1,b[1-2]", "a1"),
    ],
)
def test_slurms_first_host_is_the_meeting_point(
    nodes: str, first: str, environment: pytest.MonkeyPatch
) -> None:
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    for name, value in {**task, "SLURM_JOB_NODELIST": nodes}.items():
        environment.setenv(name, value)
    context_from_environment()
    assert os.environ["MASTER_ADDR"] == first


HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}


def test_ranks_of_several_hosts_that_do_not_know_where_they_meet(environment: pytest.MonkeyPatch) -> None:
    """On one host that is the host itself; 127.0.0.1 would leave the ranks of the second to wait for ever."""
    for name, value in {**HYDRA, "MPI_LOCALNRANKS": "2"}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*mpiexec -genv"):
        context_from_environment()


def test_ranks_of_one_host_meet_there(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**HYDRA, "MPI_LOCALNRANKS": "4"}.items():
        environment.setenv(name, value)
    context_from_environment()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "29500")


def test_a_port_that_another_run_has_taken(environment: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
            environment.setenv(name, value)
        with (
            pytest.raises(ConfigError, match=rf"port {port} is taken"),
            distributed(context_from_environment()),
        ):
            pass


def test_files_and_overrides() -> None:
    arguments = ["a", "b.yml", "c.json", "-d", "configs", "--set", "lr=1", "x=2", "--set", "y=3"]
    paths, overrides = parse_command_line("", arguments)
    assert paths == [Path("configs/a.yml"), Path("configs/b.yml"), Path("configs/c.json")]
    assert overrides == ["lr=1", "x=2", "y=3"]


def test_the_command_line_needs_no_torch() -> None:
    code = "import sys, megatron_lite.config.cli; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
