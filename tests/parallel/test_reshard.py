"""A checkpoint cut offline for a layout is the one that a run of this layout writes."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import Case, outcomes
from safetensors.torch import load_file

from megatron_lite.checkpoint import find_checkpoint, read_weights, verify
from megatron_lite.checkpoint.files import Item, write_file
from megatron_lite.checkpoint.index import Index, ParameterEntry, Piece, TensorEntry, tensor_key
from megatron_lite.checkpoint.regions import Region
from megatron_lite.checkpoint.rewrite import Span, rewrite_checkpoint
from megatron_lite.checkpoint.save import publish

ROOT = Path(__file__).resolve().parents[2]
STEP = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2, "zero_optimization": {"stage": 1}},
    "pipe": {"model_parallel_size": 2, "pipe_parallel_size": 2},
    "parameters": {"model_parallel_size": 2, "zero_optimization": {"stage": 3}},
    "replicas": {"zero_optimization": {"stage": 0}, "no_weight_tying": False},
}
"""Layouts of four ranks."""


def words(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def reshard(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The tool's exit status."""
    monkeypatch.setattr(sys, "argv", ["reshard_checkpoint.py", *map(str, arguments)])
    main = runpy.run_path(str(ROOT / "tools" / "reshard_checkpoint.py"))["main"]
    return main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one rank, and of each layout as its ranks wrote it after loading that one."""
    folder = tmp_path_factory.mktemp("reshard")
    outcomes([Case("one", last=STEP)], 1, folder)
    load = {"first": STEP, "last": STEP, "load": "one"}
    outcomes([Case(name, keys, **load) for name, keys in LAYOUTS.items()], 4, folder, timeout=120)
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
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, keys in LAYOUTS.items():
        out = tmp_path / name
        assert reshard(monkeypatch, folder / "one", out, "--set", "world_size=4", *words(keys)) == 0
        assert_same(find_checkpoint(out), find_checkpoint(folder / name))
        verify(out)
    # Without world_size there are as many replicas as before (two), here told by a file.
    (tmp_path / "target.yml").write_text("model-parallel-size: 1\npipe-parallel-size: 2\n")
    out = tmp_path / "chained"
    assert reshard(monkeypatch, folder / "tensor", out, "--config", tmp_path / "target") == 0
    assert len(list(find_checkpoint(out).glob("weights_*"))) == 4
    again = tmp_path / "again"
    back = words({**LAYOUTS["pipe"], "zero_optimization": {"stage": 0}, "world_size": 4})
    assert reshard(monkeypatch, out, again, "--set", *back) == 0
    assert_same(find_checkpoint(again), find_checkpoint(folder / "pipe"))


def test_it_loads_bitwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four ranks of "pipe" are one replica: cut for two ranks, and loaded by them."""
    keys = LAYOUTS["tensor"]
    reshard(monkeypatch, folder / "pipe", folder / "cut", "--set", "pipe_parallel_size=1", *words(keys))
    assert len(list(find_checkpoint(folder / "cut").glob("weights_*"))) == 2
    case = Case("loaded", keys, first=STEP, last=STEP, load="cut")
    outcomes([case, replace(case, name="unbroken", load="one")], 2, folder)
    assert_same(find_checkpoint(folder / "loaded"), find_checkpoint(folder / "unbroken"))


def test_what_cannot_be_is_said_and_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
        ((folder / "one", out, "--iteration", 9), "complete ones are there for steps 3"),
    ]:
        assert reshard(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert expected in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert [path.name for path in occupied.iterdir()] == ["mine"]


COUNT, ELEMENTS = 40, 1 << 19
"""Tensors of a synthetic checkpoint (each a weight and a momentum of 2 MiB): 160 MiB."""


def synthetic(folder: Path) -> Path:
    """A checkpoint of one file, every element of which is different."""
    keys = [(f"layers.{n}.weight", kind) for n in range(COUNT) for kind in ("weight", "exp_avg")]
    shape = (512, ELEMENTS // 512)

    def values(number: int) -> Item:
        name, kind = keys[number]
        first = float(number * ELEMENTS)
        key = tensor_key(name, kind, 0, ELEMENTS, None)
        return Item(key, torch.float32, ELEMENTS, lambda: torch.arange(ELEMENTS, dtype=torch.float32) + first)

    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    files = [
        write_file(temporary / "weights_00000.safetensors", [values(n) for n in range(len(keys))], {}),
        write_file(temporary / "optimizer_00000.safetensors", [], {}),
    ]
    whole = {
        name: ParameterEntry(
            shape,
            {kind: TensorEntry(shape, "float32", [Piece(0, 0, ELEMENTS)]) for kind in ("weight", "exp_avg")},
        )
        for name, _ in keys
    }
    publish(temporary, folder / "global_step1", Index(1, 1, "Lion", {}, {}, {}, {}, {}, files, whole))
    return folder / "global_step1"


def private_memory() -> int:
    """Bytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Watched while it runs: what it holds grows by little, however many tensors there are."""
    source = synthetic(tmp_path / "source")
    names = [f"layers.{n}.weight" for n in range(COUNT)]
    halves = [Region(1, ((0, 300),)), Region(1, ((300, ELEMENTS // 512),))]
    shares = [[Span(name, half, 0, 512 * half.length) for name in names] for half in halves]
    before, peak, done = private_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        out = rewrite_checkpoint(source, tmp_path / "out", shares, {})
    finally:
        done.set()
        watcher.join()
    assert peak - before < 16 << 20
    for number, (_, weight) in enumerate(read_weights(out)):
        expected = torch.arange(ELEMENTS, dtype=torch.float32) + float(2 * number * ELEMENTS)
        assert torch.equal(weight.view(-1), expected)
