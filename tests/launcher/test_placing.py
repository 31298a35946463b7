"""What is said of a machine or a layout that is not what it seems: torn groups, a torch without CUDA."""

from __future__ import annotations

import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.training_runs import KEYS, write_corpus

from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.cli import COMMAND_VARIABLE
from megatron_lite.launcher import placement, torch_build
from megatron_lite.launcher.placement import (
    BOOT_ID,
    own_machine,
    tell_of_actual_machines,
    tell_of_torn_groups,
)
from megatron_lite.planner import Gpu, Machine
from megatron_lite.utils.log import LOGGER

SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 16, "seq_length": 32}
GPUS = Machine(4, 1 << 34, 1 << 34, gpus=(Gpu("x", 1 << 34, 1 << 34),) * 4)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING, LOGGER.name)
    return caplog


def tiny(degree: int, ranks: int) -> Config:
    keys = {**SHAPE, "model_parallel_size": degree, "train_micro_batch_size_per_gpu": 1}
    return config_from_keys(keys, world_size=ranks)


@pytest.mark.parametrize(
    ("degree", "hosts", "torn"),
    [
        (4, {"a": 8, "b": 8}, None),
        (8, {"a": 8, "b": 8}, None),
        (16, {"a": 8, "b": 8}, "ranks 0 to 15 exchange activations between a and b"),
        (4, {"a": 6, "b": 6}, "ranks 4 to 7 exchange activations between a and b"),
        (2, {"a": 3, "b": 4, "c": 1}, "ranks 2 to 3"),
        (1, {"a": 3, "b": 1}, None),
    ],
)
def test_tensor_parallel_groups_across_hosts(
    degree: int, hosts: dict[str, int], torn: str | None, said: pytest.LogCaptureFixture
) -> None:
    tell_of_torn_groups(tiny(degree, sum(hosts.values())), hosts)
    assert (torn in said.text) if torn else (said.text == "")


@pytest.mark.parametrize(
    ("degree", "machines", "told"),
    [
        (2, "abab", "ranks 0 to 1 exchange activations between host-a and host-b .*--distribution=block"),
        (2, "abba", "consecutive ranks are on different hosts: ranks 0 to 1"),
        (2, "aabcbc", "consecutive ranks are on different hosts: ranks 2 to 3 .* host-b and host-c"),
        (2, "aabbaa", None),
        (1, "abab", None),
        (4, "aaaa", None),
        (2, "aaabbb", "does not divide the ranks of each host .*ranks 2 to 3 .* host-a and host-b"),
        (2, "ab", "does not divide the ranks of each host .*ranks 0 to 1"),
    ],
)
def test_where_ranks_really_are(
    degree: int, machines: str, told: str | None, said: pytest.LogCaptureFixture
) -> None:
    tell_of_actual_machines(tiny(degree, len(machines)), [(letter, f"host-{letter}") for letter in machines])
    assert re.search(told, said.text) if told else said.text == ""


def test_names_do_not_tell_machines_apart(said: pytest.LogCaptureFixture) -> None:
    """Pods of one machine have names of their own; containers of several machines may share one."""
    tell_of_actual_machines(tiny(2, 4), [("one", f"pod-{rank}") for rank in range(4)])
    assert said.text == ""
    tell_of_actual_machines(tiny(2, 4), [(machine, "node") for machine in ("one", "two", "one", "two")])
    assert "between node and node (2) in every layer" in said.text


def test_a_change_of_the_host_name_is_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = own_machine()
    monkeypatch.setattr(socket, "gethostname", lambda: "a-container")
    assert (own_machine()[0] == here[0]) == BOOT_ID.exists()
    monkeypatch.setattr(placement, "BOOT_ID", Path("/none"))
    assert own_machine() == ("a-container", "a-container")


def test_what_deepy_has_told_is_not_told_again(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has told that the degree does not fit the hosts; not what ``launcher_args: -m cyclic`` does."""
    monkeypatch.setenv(COMMAND_VARIABLE, "python deepy.py train.py")
    tell_of_actual_machines(tiny(2, 2), [("a", "a"), ("b", "b")])
    assert said.text == ""
    tell_of_actual_machines(tiny(2, 4), [(letter, letter) for letter in "abab"])
    assert "consecutive ranks are on different hosts" in said.text


def rank_of_a_run(keys: dict[str, Any], folder: Path, machines: str) -> list[str]:
    """One rank of a whole run, on a machine that its number says; the warnings that it gave."""
    from megatron_lite.data.prepare import prepare_data
    from megatron_lite.parallel.context import context_from_environment
    from megatron_lite.training.run import train

    context = context_from_environment()
    placement.BOOT_ID = folder / machines[context.rank]
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    assert train(prepare_data(config_from_keys(keys, world_size=context.world_size)), context) == 0
    return [each for each in warnings if "exchange activations" in each]


def test_a_run_whose_ranks_are_dealt_out_in_turn(tmp_path: Path) -> None:
    """As ``srun -m cyclic`` and ``mpirun --map-by node`` do. Rank 0 tells, of all groups."""
    for letter in "ab":
        (tmp_path / letter).write_text(letter)
    own = {"data_path": str(write_corpus(tmp_path)), "run_dir": str(tmp_path / "run"), "exit_interval": 1}
    keys = {**KEYS, **own, "eval_iters": 0, "model_parallel_size": 2}
    told = run_ranks(rank_of_a_run, 4, keys, tmp_path, "aaba")
    assert len(told[0]) == 1
    assert "ranks 2 to 3 exchange activations" in told[0][0]
    assert told[1:] == [[], [], []]


def test_the_installed_torch() -> None:
    version = torch_build._version_file()
    assert version is not None
    assert torch_build.has_gpus(version) == (torch.version.cuda is not None or torch.version.hip is not None)


@pytest.mark.parametrize(
    ("version", "has_gpus"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None", True),
        ("cuda = None\nhip = '6.2.41133'", True),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None", False),
        (None, True),
    ],
)
def test_gpus_that_torch_cannot_use_are_not_counted(
    version: str | None, has_gpus: bool, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_build, "_version_file", lambda: version)
    assert len(torch_build.usable(GPUS).gpus) == (4 if has_gpus else 0)
    assert ("the 4 GPUs of this machine stay unused" in said.text) == (not has_gpus)
