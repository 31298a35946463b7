"""The command line for MPI's launchers, and what cannot be asked of them. Real runs: test_real_mpi.py."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.mpi import HYDRA, MPI_LAUNCHERS, environment_file, mpi_command
from megatron_lite.launcher.resources import find_resources
from megatron_lite.planner import Machine
from megatron_lite.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(cores=4, memory_total=1 << 34, memory_available=1 << 34)


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMPI's mpirun and a Hydra, by name, in an empty home; not root."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("mpirun", "mpiexec.hydra"):
        (programs / name).write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def words(hosts: str, environment: dict[str, str] | None = None, **given: Any) -> list[str]:
    """The words after the program, for a hostfile of the lines ``hosts``."""
    Path("hosts").write_text(hosts)
    keys = LauncherSection(hostfile="hosts", force_multi=True, **given)
    command = ["python", "train.py"]
    return mpi_command(keys, find_resources(keys, MACHINE), command, environment or {})[1:]


FOUR = "alpha slots=4\nbeta slots=4\n"


def test_openmpi_keeps_consecutive_ranks_together_and_binds_none() -> None:
    found = words("alpha slots=4\nbeta slots=2\n", launcher="openmpi")
    assert found[:8] == ["-n", "6", "--host", "alpha:4,beta:2", "--map-by", "slot", "--bind-to", "none"]
    assert found[-2:] == ["python", "train.py"]
    own = words(FOUR, launcher="openmpi", launcher_args="--bind-to core --mca a 'b c'")
    assert own.count("--bind-to") == 1
    assert own[-7:] == ["--bind-to", "core", "--mca", "a", "b c", "python", "train.py"]


def test_openmpi_is_told_what_to_hand_on_by_name_alone(tmp_path: Path) -> None:
    """mpirun takes the values from its own environment: quotes and commas in them need no care."""
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=1\n\n")
    names = ["MASTER_ADDR", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "MEGATRON_LITE_COMMAND", "FROM_FILE"]
    names += ["WANDB_API_KEY"]
    found = words(FOUR, dict.fromkeys([*names, "SECRET", "XNCCL"], 'a "b", c'), launcher="openmpi")
    handed = [name for flag, name in pairwise(found) if flag == "-x"]
    assert handed == sorted(names)


def test_the_file_of_variables_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    text = '# a=b\n\nexport ONE="eth0"\n TWO = \nTHREE=\'a "$b"\'\nFOUR=x=y\n'
    (tmp_path / ".deepspeed_env").write_text(text)
    assert environment_file() == {"ONE": "eth0", "TWO": "", "THREE": 'a "$b"', "FOUR": "x=y"}


@pytest.mark.parametrize(
    ("line", "message"),
    [("PATH=/opt/x:$PATH", "PATH has a [$]"), ("eth0", "NAME=VALUE"), ("A B=1", "NAME=VALUE")],
)
def test_lines_that_no_variable_can_be_read_from(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / ".deepspeed_env").write_text(f"FINE=1\n{line}\n")
    with pytest.raises(ConfigError, match=rf"\.deepspeed_env:2: .*{message}"):
        environment_file()


@pytest.mark.parametrize("launcher", HYDRA)
def test_hydra_hands_on_everything(launcher: Any) -> None:
    found = words(FOUR, launcher=launcher, launcher_args="-iface eth1")
    assert found[:7] == ["-n", "8", "-ppn", "4", "-hosts", "alpha,beta", "-genvall"]
    assert found[-4:] == ["-iface", "eth1", "python", "train.py"]


@pytest.mark.parametrize("launcher", MPI_LAUNCHERS)
@pytest.mark.parametrize(
    ("given", "ranks"), [({"include": "beta"}, 4), ({"num_nodes": 1}, 4), ({"num_gpus": 3}, 6)]
)
def test_whole_hosts_and_fewer_ranks_are_possible(launcher: Any, given: dict[str, Any], ranks: int) -> None:
    assert words(FOUR, launcher=launcher, **given)[:2] == ["-n", str(ranks)]


@pytest.mark.parametrize(
    ("launcher", "hosts", "given", "message"),
    [
        ("openmpi", FOUR, {"include": "alpha:2,3"}, r"not on its slots \[2, 3\].*whole hosts"),
        ("mpich", "alpha slots=4\nbeta slots=2\n", {}, "as many ranks on every host.*num_gpus"),
    ],
)
def test_what_they_cannot_do(launcher: Any, hosts: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        words(hosts, launcher=launcher, **given)


FAILS = """
import sys
from megatron_lite.utils.hydra import end_other_ranks

print("of standard output")
print("of standard error", file=sys.stderr)
end_other_ranks(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there does a pipe tell its writer what is unread")
@pytest.mark.parametrize("order", [["output", "error"], ["error", "output"]])
def test_hydra_learns_of_a_failure_when_it_has_read_the_output(order: list[str]) -> None:
    """It reads the output and what ranks tell it in any order, and then drops the rest of the output."""
    hydra, rank = socket.socketpair()
    hydra.settimeout(60)
    environment = {**os.environ, "MPI_LOCALNRANKS": "2", "PMI_FD": str(rank.fileno())}
    environment.pop("PYTHONUNBUFFERED", None)
    with subprocess.Popen(
        [sys.executable, "-c", FAILS], cwd=ROOT, env=environment, pass_fds=[rank.fileno()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        pipes: dict[str, Any] = {"output": process.stdout, "error": process.stderr}
        for name in order:
            assert select.select([pipes[name]], [], [], 60)[0]
            assert not select.select([hydra], [], [], 0.3)[0], "told before all is read"
            assert os.read(pipes[name].fileno(), 100) == f"of standard {name}\n".encode()
        assert hydra.recv(100) == b"cmd=abort exitcode=3\n"
    hydra.close()
    rank.close()


@pytest.mark.parametrize(("launcher", "program"), [("openmpi", "mpirun"), ("impi", "mpiexec.hydra")])
def test_a_launcher_that_is_not_installed(
    launcher: Any, program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"launcher {launcher}: {program} is not installed"):
        words(FOUR, launcher=launcher)


def test_the_mpirun_of_another_mpi(tmp_path: Path) -> None:
    (tmp_path / "bin/mpirun").write_text("#!/bin/sh\necho 'HYDRA build details:'\n")
    with pytest.raises(ConfigError, match="bin/mpirun belongs to another MPI"):
        words(FOUR, launcher="openmpi")


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment than the Makefile's")
def test_the_environment_hides_no_mpi_of_the_cluster() -> None:
    """The tests' own MPIs lie beside it: an activated .venv comes first in PATH."""
    programs = Path(sys.prefix) / "bin"
    assert [path.name for path in programs.iterdir() if path.name.startswith("mpi")] == []


def test_openmpi_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="launcher_args to --allow-run-as-root"):
        words(FOUR, launcher="openmpi")
    words(FOUR, launcher="openmpi", launcher_args="--allow-run-as-root")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1"}
    with pytest.raises(ConfigError, match="launcher_args to --allow-run-as-root"):
        words(FOUR, allowed, launcher="openmpi")
    words(FOUR, {**allowed, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}, launcher="openmpi")
    words(FOUR, launcher="mpich")
