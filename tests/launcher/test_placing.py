"""What is said of a machine or a layout that is not what it seems: torn groups, a torch without CUDA."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_lite.config import config_from_keys
from megatron_lite.launcher import torch_build
from megatron_lite.launcher.placement import even_hosts, tell_of_torn_groups
from megatron_lite.planner import Gpu, Machine
from megatron_lite.utils.log import LOGGER

SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 16, "seq_length": 32}
GPUS = Machine(4, 1 << 34, 1 << 34, gpus=(Gpu("x", 1 << 34, 1 << 34),) * 4)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING, LOGGER.name)
    return caplog


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
    keys = {**SHAPE, "model_parallel_size": degree, "train_micro_batch_size_per_gpu": 1}
    tell_of_torn_groups(config_from_keys(keys, world_size=sum(hosts.values())), hosts)
    assert (torn in said.text) if torn else (said.text == "")


def test_hosts_of_which_only_the_size_is_known() -> None:
    assert list(even_hosts(16, 8).values()) == [8, 8]
    assert list(even_hosts(10, 4).values()) == [4, 4, 2]
    assert list(even_hosts(1, 1).values()) == [1]


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
