"""A checkpoint cut offline for a layout is the one that a run of this layout writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import SAMPLES, Case, outcomes
from safetensors.torch import load_file

from megatron_lite.checkpoint import find_checkpoint, verify

STEP = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2, "zero_optimization": {"stage": 1}},
    "pipe": {"model_parallel_size": 2, "pipe_parallel_size": 2},
    "parameters": {"model_parallel_size": 2, "zero_optimization": {"stage": 3}},
    "replicas": {"zero_optimization": {"stage": 0}, "no_weight_tying": False},
}
"""Layouts of four ranks."""

MODELS: dict[str, dict[str, Any]] = {
    "experts": {
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "activation": "swiglu",
        "mlp_multiple_of": 8,
        "optimizer": {"type": "Lion", "params": {"lr": 1e-3}},
        "train_batch_size": 8,
    },
    "muon": {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}},
    "adafactor": {"optimizer": {"type": "Adafactor", "params": {"lr": 1e-3}}},
}
"""Models and optimizers, each with state of its own kind; they begin on one rank."""

TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "divided": ("experts", {"expert_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "divided-split": (
        "experts",
        {"expert_parallel_size": 2, "model_parallel_size": 2, "zero_optimization": {"stage": 2}},
    ),
    "divided-staged": (
        "experts",
        {"expert_parallel_size": 2, "pipe_parallel_size": 2, "zero_optimization": {"stage": 0}},
    ),
    "undivided": ("experts", {"zero_optimization": {"stage": 3}}),
    "muon-partitions": ("muon", {"zero_optimization": {"stage": 1}}),
    "muon-parameters": ("muon", {"zero_optimization": {"stage": 3}}),
    "adafactor-replicas": ("adafactor", {"zero_optimization": {"stage": 0}}),
}
"""Which model, and a layout of four ranks for it."""


def samples(model: str) -> dict[str, Any]:
    return {"samples": (MODELS[model].get("train_batch_size", SAMPLES),)}


def words(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one rank, and of each layout as its ranks wrote it after loading that one."""
    folder = tmp_path_factory.mktemp("reshard")
    begun = [Case(name, keys, **samples(name), last=STEP) for name, keys in MODELS.items()]
    outcomes([Case("one", last=STEP), *begun], 1, folder)
    load = {"first": STEP, "last": STEP, "load": "one"}
    cases = [Case(name, keys, **load) for name, keys in LAYOUTS.items()]
    for name, (model, keys) in TARGETS.items():
        cases.append(Case(name, MODELS[model] | keys, first=STEP, last=STEP, load=model))
    outcomes(cases, 4, folder)
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """The same elements in the same files."""
    ours, theirs = (json.loads((path / "index.json").read_text()) for path in (found, expected))
    for key in ("parameters", "world_size", "step", "trainer_state", "engine", "optimizer"):
        assert ours[key] == theirs[key], key
    assert [entry["name"] for entry in ours["files"]] == [entry["name"] for entry in theirs["files"]]
    for entry in ours["files"]:
        one, other = (load_file(path / entry["name"]) for path in (found, expected))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one)


def test_it_is_what_the_ranks_of_the_layout_write(
    folder: Path, tmp_path: Path, run_tool: Callable[..., int]
) -> None:
    for name, keys in LAYOUTS.items():
        out = tmp_path / name
        assert run_tool("reshard_checkpoint", folder / "one", out, "--set", "world_size=4", *words(keys)) == 0
        assert_same(find_checkpoint(out), find_checkpoint(folder / name))
        verify(out)
    # Without world_size there are as many replicas as before (two), here told by a file.
    (tmp_path / "target.yml").write_text("model-parallel-size: 1\npipe-parallel-size: 2\n")
    out = tmp_path / "chained"
    assert run_tool("reshard_checkpoint", folder / "tensor", out, "--config", tmp_path / "target") == 0
    assert len(list(find_checkpoint(out).glob("weights_*"))) == 4
    again = tmp_path / "again"
    back = words({**LAYOUTS["pipe"], "zero_optimization": {"stage": 0}, "world_size": 4})
    assert run_tool("reshard_checkpoint", out, again, "--set", *back) == 0
    assert_same(find_checkpoint(again), find_checkpoint(folder / "pipe"))


@pytest.mark.parametrize("name", TARGETS)
def test_experts_and_other_optimizers(
    name: str, folder: Path, tmp_path: Path, run_tool: Callable[..., int]
) -> None:
    model, keys = TARGETS[name]
    assert (
        run_tool("reshard_checkpoint", folder / model, tmp_path, "--set", "world_size=4", *words(keys)) == 0
    )
    assert_same(find_checkpoint(tmp_path), find_checkpoint(folder / name))
    verify(tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_as_from_the_checkpoint_itself(folder: Path, run_tool: Callable[..., int]) -> None:
    """Cut for two ranks, from one rank and from four, and loaded by them: losses, norms, state bit by bit."""
    divided, stage1 = {"expert_parallel_size": 2}, {"zero_optimization": {"stage": 1}}
    whole = ["expert_parallel_size=1", "pipe_parallel_size=1", "model_parallel_size=1"]
    cases = []
    for name, source, model, keys in (
        ("dense", "pipe", None, LAYOUTS["tensor"]),
        ("split", "divided-staged", "experts", {"model_parallel_size": 2, **stage1}),
        ("experts-2", "divided-split", "experts", {**divided, **stage1}),
        ("muon-2", "muon-parameters", "muon", {"zero_optimization": {"stage": 2}}),
    ):
        cut = [*(word for word in whole if word.split("=")[0] not in keys), "world_size=2", *words(keys)]
        assert run_tool("reshard_checkpoint", folder / source, folder / f"{name}-cut", "--set", *cut) == 0
        assert len(list(find_checkpoint(folder / f"{name}-cut").glob("weights_*"))) == 2
        more = {} if model is None else {"keys": MODELS[model] | keys, **samples(model)}
        case = Case(f"{name}-loaded", **{"keys": keys, **more}, first=STEP, last=STEP + 2, load=f"{name}-cut")
        cases += [case, replace(case, name=f"{name}-direct", load=model or "one")]
    told = outcomes(cases, 2, folder)
    for loaded, direct, case in zip(told[::2], told[1::2], cases[::2], strict=True):
        assert loaded == direct, case.name
        name = case.name.removesuffix("-loaded")
        assert_same(find_checkpoint(folder / case.name), find_checkpoint(folder / f"{name}-direct"))


def test_what_cannot_be_is_said_and_writes_nothing(
    folder: Path, tmp_path: Path, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine").write_text("mine")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    source = find_checkpoint(folder / "one")
    for path in source.iterdir():
        content = bytearray(path.read_bytes())
        if path.name.startswith("optimizer"):
            content[-1] ^= 1
        (damaged / path.name).write_bytes(content)
    out = tmp_path / "out"
    for arguments, expected in [
        ((source, occupied), "occupied is there and not empty: name a new folder"),
        ((source, out, "--set", "model_parallel_size=3"), "model_parallel_size 3 does not divide"),
        ((source, out, "--set", "hidden_size=64"), "is of another model: it has in another shape"),
        ((source, out, "--set", "world_size=4", "model_parallel_size=8"), "4 ranks do not divide into"),
        ((damaged, out), "optimizer_00000.safetensors is corrupt: its checksum is wrong"),
        (
            (folder / "adafactor", out, "--set", "zero_optimization.stage=1"),
            "has Adafactor's state of rows and columns, and ZeRO stage 1 in fp32 keeps the other",
        ),
        ((folder / "one", out, "--iteration", 9), "complete ones are there for steps 3"),
    ]:
        assert run_tool("reshard_checkpoint", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert expected in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert [path.name for path in occupied.iterdir()] == ["mine"]
