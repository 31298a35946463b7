"""The tool shows what is inside, and finds every kind of damage, one sentence each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import verify
from megatron_lite.checkpoint.files import ElementReader, item_of, write_file
from megatron_lite.checkpoint.index import (
    FileEntry,
    Index,
    ParameterEntry,
    Piece,
    TensorEntry,
    _checksum,
    tensor_key,
)
from megatron_lite.checkpoint.regions import Region
from megatron_lite.checkpoint.save import publish
from megatron_lite.checkpoint.verification import find_problems
from megatron_lite.config import config_from_keys
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory, spec_of
from megatron_lite.utils.errors import CheckpointError

KEYS = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 32,
    "make_vocab_size_divisible_by": 32,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "model_parallel_size": 2,
    "zero_optimization": {"stage": 1},
    "precision": "bf16",
    "tokenizer_type": "ByteTokenizer",
}
CONFIG = config_from_keys(KEYS, world_size=2)
DENSE, LAST = "layers.1.mlp.dense_4h_to_h.weight", "final_layer_norm.bias"
HALVES = [Region(1, ((0, 32),)), Region(1, ((32, 64),))]
Tensors = dict[tuple[str, str], torch.Tensor]


def whole_model() -> Tensors:
    """Weights and a momentum, by (name, kind)."""
    tensors = {}
    for parameter in build_gpt(CONFIG, ParameterFactory(seed=1)).parameters():
        weight = parameter.detach()
        tensors[spec_of(parameter).name, "weight"] = weight
        tensors[spec_of(parameter).name, "exp_avg"] = weight * 0.1
    return tensors


def make(folder: Path, tensors: Tensors, scalar: float = 3.0) -> Path:
    """A checkpoint of two ranks: rank 1 has one half of ``DENSE`` and all else is rank 0's."""
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    parameters: dict[str, ParameterEntry] = {}
    files: list[FileEntry] = []
    for rank in (0, 1):
        for prefix in ("weights", "optimizer"):
            items = []
            for (name, kind), tensor in tensors.items():
                own_region = HALVES[rank] if name == DENSE else None
                if (kind == "weight") != (prefix == "weights") or (rank == 1 and own_region is None):
                    continue
                part = tensor if own_region is None else tensor[:, 32 * rank : 32 * rank + 32].contiguous()
                entry = parameters.setdefault(name, ParameterEntry(tuple(tensor.shape), {}, {"step": scalar}))
                stored = entry.tensors.setdefault(kind, TensorEntry(tuple(tensor.shape), "float32", []))
                stored.pieces.append(Piece(len(files), 0, part.numel(), own_region))
                items.append(item_of(tensor_key(name, kind, 0, part.numel(), own_region), part.view(-1)))
            files.append(write_file(temporary / f"{prefix}_{rank:05d}.safetensors", items, {}))
    versions, state = {"megatron_lite": "0.1.0"}, {"step": 7, "samples": 2800}
    index = Index(7, 2, "Lion", state, CONFIG.flat(), {}, {}, versions, files, parameters)
    publish(temporary, folder / "global_step7", index)
    return folder / "global_step7"


def test_a_sound_checkpoint(
    tmp_path: Path, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = whole_model()
    checkpoint = make(tmp_path, tensors)
    assert run_tool("inspect_checkpoint", tmp_path, "--verify") == 0
    shown = " ".join(capsys.readouterr().out.split())
    elements = sum(tensor.numel() for (_, kind), tensor in tensors.items() if kind == "weight")
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    for expected in (
        "step 7 trainer step 7, samples 2,800 ",
        "layout 2 ranks (tensor 2), ZeRO 1, bf16 ",
        "optimizer Lion: exp_avg, step ",
        f"weights {elements:,} elements of {len(tensors) // 2} parameters ",
        f"size {size / 1024:.1f} KiB in 4 files, format 3 ",
        f"{DENSE} 16 x 64 float32 2 of dim 1 2 exp_avg ",
        "layers.0.mlp.dense_4h_to_h.bias 16 float32 1 1 exp_avg ",
        "sound: every file as it was written",
    ):
        assert expected in shown, expected
    assert run_tool("inspect_checkpoint", checkpoint, "--verify", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert (facts["elements"], facts["bytes"]) == (elements, size)
    assert facts["parameters"][DENSE] == {
        "shape": [16, 64],
        "dtype": "float32",
        "shards": 2,
        "divided_dimension": 1,
        "pieces": 2,
        "state": {
            "exp_avg": {
                "shape": [16, 64], "dtype": "float32", "shards": 2, "divided_dimension": 1, "pieces": 2,
            }
        },
        "numbers": {"step": 3.0},
    }  # fmt: skip
    assert facts["config"] == CONFIG.flat()
    verify(tmp_path)


def spoil(name: str, kind: str, value: float) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        tensors = whole_model()
        tensors[name, kind].view(-1)[40:43] = value
        return make(folder, tensors)

    return build


def without(lost: Callable[[str, str], bool]) -> Callable[[Path], Path]:
    """All is there and whole but the tensors, by name and kind, that are ``lost``."""

    def build(folder: Path) -> Path:
        return make(folder, {key: value for key, value in whole_model().items() if not lost(*key)})

    return build


def without_a_parameter(folder: Path) -> Path:
    return without(lambda name, kind: name == LAST)(folder)


def of_a_newer_version(folder: Path) -> Path:
    """Lacks a parameter, which the configuration would tell that this version does not understand."""
    checkpoint = without_a_parameter(folder)
    with changed_index(checkpoint) as index:
        index["config"]["key_of_tomorrow"] = 1
        index["versions"]["megatron_lite"] = "7.8.9"
    return checkpoint


def without_state(folder: Path) -> Path:
    checkpoint = without(lambda name, kind: (name, kind) == (LAST, "exp_avg"))(folder)
    with changed_index(checkpoint) as index:
        index["parameters"][LAST]["scalars"] = {}
    return checkpoint


@contextmanager
def changed_index(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The index, to be changed; its checksum is right again afterwards."""
    path = checkpoint / "index.json"
    index = json.loads(path.read_text())
    yield index
    index["checksum"] = _checksum(index)
    path.write_text(json.dumps(index))


def damaged(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        checkpoint = make(folder, whole_model())
        change(checkpoint)
        return checkpoint

    return build


def flip(checkpoint: Path) -> None:
    path = checkpoint / "optimizer_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def swapped(folder: Path) -> Path:
    """Its own checkpoint, but the weights of rank 1 are of another kind than the index says."""
    checkpoint = make(folder, whole_model())
    (checkpoint / "weights_00001.safetensors").unlink()
    item = item_of("weight/other[0:4]", torch.zeros(4))
    entry = write_file(checkpoint / "weights_00001.safetensors", [item], {})
    with changed_index(checkpoint) as index:
        index["files"][2] = {"name": entry.name, "bytes": entry.bytes, "xxh3": entry.xxh3}
    return checkpoint


NAN = "that are NaN or infinite"
PROBLEMS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "NaN": (spoil(DENSE, "weight", math.nan), [f"weight of {DENSE}", "3 values of 1,024 " + NAN]),
    "infinity": (spoil("embed_in.weight", "exp_avg", -math.inf), ["exp_avg of embed_in.weight", NAN]),
    "number": (lambda f: make(f, whole_model(), math.nan), ["step of embed_in.weight", "is nan"]),
    "parameter": (without_a_parameter, [f"another model: it lacks {LAST}"]),
    "newer version": (of_a_newer_version, ["could not be checked", "no key key_of_tomorrow", "7.8.9"]),
    "part of the state": (
        without(lambda name, kind: (name, kind) == (DENSE, "exp_avg")),
        [f"state of {DENSE} in ", "is incomplete: it has step, and other parameters have exp_avg, step;"],
    ),
    "state": (
        without_state,
        [f"state of {LAST} in ", "it has none, and other parameters have exp_avg, step;"],
    ),
    "flipped": (damaged(flip), ["optimizer_00001.safetensors is corrupt: its checksum is wrong"]),
    "truncated": (
        damaged(lambda c: os.truncate(c / "weights_00000.safetensors", 99)),
        ["weights_00000.safetensors has 99 bytes and should have"],
    ),
    "missing": (
        damaged(lambda c: (c / "weights_00001.safetensors").unlink()),
        ["weights_00001.safetensors is missing"],
    ),
    "swapped": (swapped, [f"lacks weight/{DENSE}(dim 1 32:64)[0:512]"]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_is_said(
    name: str, tmp_path: Path, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = PROBLEMS[name]
    checkpoint = build(tmp_path)
    assert run_tool("inspect_checkpoint", checkpoint) == 0, "showing does not read the tensors"
    assert run_tool("inspect_checkpoint", checkpoint, "--verify") == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("problem: ") for line in lines)
    assert len(lines) == {"number": len(whole_model()) // 2, "swapped": 2}.get(name, 1)
    assert all(part in lines[0] for part in expected)
    assert run_tool("inspect_checkpoint", checkpoint, "--verify", "--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        line.removeprefix("problem: ") for line in lines
    ]
    with pytest.raises(CheckpointError, match=re.escape(lines[0].removeprefix("problem: "))):
        verify(checkpoint)


def own_model(folder: Path) -> Path:
    """Saved from Python, without a run's configuration, and with a frozen parameter."""
    checkpoint = without_state(folder)
    with changed_index(checkpoint) as index:
        index["config"] = {"mine": 1}
    return checkpoint


def one_that_never_trained(folder: Path) -> Path:
    """Weights only: neither momentum nor steps."""
    checkpoint = without(lambda name, kind: kind != "weight")(folder)
    with changed_index(checkpoint) as index:
        for parameter in index["parameters"].values():
            parameter["scalars"] = {}
    return checkpoint


def muon(folder: Path) -> Path:
    """Momentum for one matrix, and two moments of Adam for the rest."""
    tensors = whole_model()
    for name, kind in list(tensors):
        if kind == "exp_avg" and name != DENSE:
            tensors[name, "exp_avg_sq"] = tensors[name, kind]
    tensors[DENSE, "momentum_buffer"] = tensors.pop((DENSE, "exp_avg"))
    checkpoint = make(folder, tensors)
    with changed_index(checkpoint) as index:
        index["parameters"][DENSE]["scalars"] = {}
    return checkpoint


@pytest.mark.parametrize("build", [own_model, one_that_never_trained, muon])
def test_no_false_alarm(build: Callable[[Path], Path], tmp_path: Path) -> None:
    verify(build(tmp_path))


class Counted(list[Piece]):
    """Pieces, and how often all of them were gone through."""

    times = 0

    def __iter__(self) -> Iterator[Piece]:
        self.times += 1
        return super().__iter__()


def test_pieces_are_not_gone_through_for_every_file(tmp_path: Path) -> None:
    times = {}
    for ranks in (2, 9):
        pieces = Counted(Piece(n, n, n + 1) for n in range(ranks))
        files = [
            write_file(tmp_path / f"{ranks}_{n}", [item_of(f"weight/a[{n}:{n + 1}]", torch.ones(1))], {})
            for n in range(ranks)
        ]
        parameters = {"a": ParameterEntry((ranks,), {"weight": TensorEntry((ranks,), "float32", pieces)})}
        index = Index(1, ranks, "Adam", {}, {}, {}, {}, {}, files, parameters)
        assert list(find_problems(ElementReader(tmp_path, index))) == []
        times[ranks] = pieces.times
    assert times[9] == times[2], "the work grows as ranks by files"


def test_what_is_no_checkpoint(
    tmp_path: Path, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("inspect_checkpoint", tmp_path / "nowhere", "--verify") == 2
    assert "the folder does not exist" in capsys.readouterr().err
    checkpoint = make(tmp_path, whole_model())
    index = json.loads((checkpoint / "index.json").read_text())
    index["parameters"][DENSE]["tensors"]["exp_avg"]["pieces"].pop()
    (checkpoint / "index.json").write_text(json.dumps(index))
    assert run_tool("inspect_checkpoint", checkpoint) == 2
    assert f"does not cover exp_avg of {DENSE}" in capsys.readouterr().err
