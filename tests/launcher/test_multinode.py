"""Which hosts take part, and DeepSpeed's command line for them, read back by DeepSpeed's own parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.multinode import runner_arguments, start_on_hosts
from megatron_lite.launcher.resources import find_resources, launcher_keys
from megatron_lite.planner import Gpu, Machine
from megatron_lite.utils.errors import ConfigError

CPU = Machine(cores=4, memory_total=1 << 34, memory_available=1 << 34)
GPUS = Machine(
    cores=4, memory_total=1 << 34, memory_available=1 << 34, gpus=(Gpu("x", 1 << 34, 1 << 34),) * 4
)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# two machines\nalpha slots=4\nbeta slots=4\n")
    return str(path)


@pytest.fixture(autouse=True)
def _no_default_hostfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLTS_HOSTFILE", str(tmp_path / "none"))


def keys(**values: Any) -> LauncherSection:
    return LauncherSection(**values)


def parsed(section: LauncherSection, *arguments: str) -> Any:
    from deepspeed.launcher.runner import parse_args

    return parse_args(runner_arguments(section, find_resources(section, CPU), "train.py", arguments))


@pytest.mark.parametrize(
    ("machine", "given", "ranks"),
    [(CPU, {}, 1), (CPU, {"num_gpus": 3}, 3), (GPUS, {}, 4), (GPUS, {"num_gpus": 2}, 2)],
)
def test_ranks_of_one_machine(machine: Machine, given: dict[str, int], ranks: int) -> None:
    resources = find_resources(keys(**given), machine)
    assert (resources.ranks, resources.several) == (ranks, False)


def test_slots_of_one_machine_picked_by_name() -> None:
    resources = find_resources(keys(include="localhost:1,3"), GPUS)
    assert resources.hosts == {"localhost": [1, 3]}
    assert resources.chosen
    assert not resources.several


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, {"alpha": 4, "beta": 4}),
        ({"num_nodes": 1}, {"alpha": 4}),
        ({"num_gpus": 2}, {"alpha": 2, "beta": 2}),
        ({"include": "beta:0,3"}, {"beta": 2}),
        ({"exclude": "alpha:1"}, {"alpha": 3, "beta": 4}),
    ],
)
def test_hosts_of_a_hostfile(hostfile: str, given: dict[str, Any], hosts: dict[str, int]) -> None:
    resources = find_resources(keys(hostfile=hostfile, **given), CPU)
    assert {host: len(slots) for host, slots in resources.hosts.items()} == hosts
    assert resources.ranks == sum(hosts.values())
    assert resources.several == (len(hosts) > 1)


def test_the_default_hostfile(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTS_HOSTFILE", hostfile)
    assert find_resources(keys(), CPU).ranks == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_nodes": 2}, "hostfile"),
        ({"force_multi": True}, "hostfile"),
        ({"num_gpus": 5}, "4 GPUs are visible"),
        ({"include": "elsewhere:0"}, "elsewhere"),
        ({"include": "localhost:9"}, "slot"),
        ({"include": "localhost:0", "exclude": "localhost:1"}, "exclusive"),
    ],
)
def test_what_is_not_there(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_resources(keys(**given), GPUS)


def test_a_bad_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_text("alpha four\n")
    with pytest.raises(ConfigError, match="bad entry"):
        find_resources(keys(hostfile=str(path)), CPU)


def test_keys_are_read_before_the_number_of_ranks_is_known(tmp_path: Path) -> None:
    """A batch that divides only by the ranks of the hostfile must not stop the reading of its key."""
    path = tmp_path / "run.yml"
    path.write_text("train_batch_size: 7\nnum-gpus: 7\nhostfile: /some/where\n")
    section = launcher_keys([path], ["num_nodes=3"])
    assert (section.num_gpus, section.hostfile, section.num_nodes) == (7, "/some/where", 3)


def test_deepspeed_reads_our_arguments(hostfile: str) -> None:
    section = keys(
        hostfile=hostfile, num_nodes=2, num_gpus=2, master_port=4000, master_addr="10.0.0.1",
        launcher_args="-x A=b", no_ssh_check=True, force_multi=True,
    )  # fmt: skip
    args = parsed(section, "a.yml", "--set", "seed=1")
    assert (args.hostfile, args.num_nodes, args.num_gpus) == (hostfile, 2, 2)
    assert (args.master_port, args.master_addr, args.launcher) == (4000, "10.0.0.1", "pdsh")
    assert args.launcher_args == "-x A=b"
    assert args.no_ssh_check
    assert args.force_multi
    assert args.no_local_rank
    assert args.user_script == "train.py"
    assert args.user_args == ["a.yml", "--set", "seed=1"]


def test_defaults_leave_deepspeeds_own(hostfile: str) -> None:
    args = parsed(keys(hostfile=hostfile), "a.yml")
    assert (args.num_nodes, args.num_gpus, args.include, args.exclude, args.master_addr) == (
        -1,
        -1,
        "",
        "",
        "",
    )
    assert not args.force_multi
    assert not args.no_ssh_check


def test_a_filter_by_name(hostfile: str) -> None:
    assert parsed(keys(hostfile=hostfile, exclude="alpha:1"), "a.yml").exclude == "alpha:1"


@pytest.mark.parametrize(
    ("launcher", "told"),
    [
        ("openmpi", "-x MASTER_ADDR=alpha -x MASTER_PORT=29500"),
        ("mvapich", "-env MASTER_ADDR=alpha -env MASTER_PORT=29500"),
        ("slurm", "--comment='two words' --account=lab"),
        ("mpich", ""),
        ("impi", ""),
    ],
)
def test_mpi_and_slurm_need_no_ssh(hostfile: str, launcher: Any, told: str) -> None:
    names = {"comment": "two words", "account": "lab"}
    args = parsed(keys(hostfile=hostfile, launcher=launcher, **names), "a.yml")
    assert (args.launcher, args.launcher_args) == (launcher, told)
    assert args.no_ssh_check
    assert args.master_addr == "alpha"


def test_words_survive_the_remote_shell(hostfile: str) -> None:
    """As pdsh sends them: DeepSpeed joins the words, and a shell on the other host splits them again."""
    import shlex

    from deepspeed.launcher.multinode_runner import PDSHRunner

    words = [
        "a.yml",
        "--set",
        "betas=[0.9, 0.95]",
        "attention_config=[[[global],4]]",
        "x=$HOME",
        "zero={stage: 1}",
    ]
    args = parsed(keys(hostfile=hostfile), *words)
    remote = PDSHRunner(args, "e30=").user_arguments
    assert shlex.split(" ".join(remote)) == words


def test_a_launcher_that_is_not_installed(
    hostfile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "")
    section = keys(hostfile=hostfile, launcher="openmpi")
    with pytest.raises(ConfigError, match=r"launcher openmpi: .*not installed"):
        start_on_hosts(section, find_resources(section, CPU), "train.py", ["a.yml"])
