"""The files themselves: safetensors for others, ranges for us, an index that survives the round trip."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_lite.checkpoint import files as module
from megatron_lite.checkpoint.files import DTYPES, ElementReader, check_file, item_of, write_file
from megatron_lite.checkpoint.index import (
    FileEntry,
    Index,
    ParameterEntry,
    Piece,
    TensorEntry,
    check_complete,
    encode_index,
    read_index,
    tensor_key,
)
from megatron_lite.checkpoint.regions import blocks
from megatron_lite.utils.errors import CheckpointError


def index_of(parameters: dict[str, ParameterEntry], files: list[FileEntry]) -> Index:
    return Index(
        step=3,
        world_size=2,
        optimizer="AdamW",
        trainer_state={"step": 3, "losses": [1.5, None]},
        config={"train-iters": 20, "name": "ä\n"},
        engine={"global_steps": 3},
        loss_scaler={"cur_scale": 65536.0},
        versions={"torch": "2"},
        files=files,
        parameters=parameters,
    )


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in DTYPES} | {"empty": torch.empty(0)}
    path = tmp_path / "a.safetensors"
    entry = write_file(path, [item_of(key, data) for key, data in tensors.items()], {"note": "ü"})
    for key, read in load_file(path).items():
        assert read.dtype == tensors[key].dtype
        assert torch.equal(read, tensors[key])
    assert load_file(path).keys() == tensors.keys()
    assert entry == FileEntry(
        "a.safetensors", path.stat().st_size, xxhash.xxh3_64_hexdigest(path.read_bytes())
    )
    check_file(tmp_path, entry)


def test_every_read_is_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4,000 bytes and a header, verified 1,000 bytes at a time, and of 1,000 elements, 300 at a time."""
    monkeypatch.setattr(module, "BLOCK", 1000)
    monkeypatch.setattr(module, "CHUNK", 300)
    signs: list[str] = []

    def sign(doing: str, longer: bool = False) -> None:
        assert not longer
        signs.append(doing)

    path = tmp_path / "a.safetensors"
    key = tensor_key("w", "weight", 0, 1000, None)
    entry = write_file(path, [item_of(key, torch.arange(1000.0))], {})
    check_file(tmp_path, entry, sign)
    assert signs == [f"verifying {path}"] * -(-entry.bytes // 1000)
    signs.clear()
    tensor = TensorEntry((1000,), "float32", [Piece(0, 0, 1000)])
    reader = ElementReader(
        tmp_path, index_of({"w": ParameterEntry((1000,), {"weight": tensor})}, [entry]), sign
    )
    target = torch.empty(1000)
    reader.read_into(target, "w", "weight", 0)
    assert torch.equal(target, torch.arange(1000.0))
    assert signs == [f"reading {path}"] * 4


@given(data=st.data(), size=st.integers(1, 60))
def test_any_range_is_read_from_any_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int
) -> None:
    """A tensor cut anywhere into files gives back every range of it, in every dtype."""
    folder = tmp_path_factory.mktemp("cut")
    whole = torch.randn(size)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1) if size > 1 else st.nothing()))), size]
    files, pieces = [], []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        key = tensor_key("w", "weight", start, stop, None)
        files.append(write_file(folder / f"{number}.safetensors", [item_of(key, whole[start:stop])], {}))
        pieces.insert(0, Piece(number, start, stop))
    index = index_of(
        {"w": ParameterEntry((size,), {"weight": TensorEntry((size,), "float32", pieces)})}, files
    )
    check_complete(index, folder)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.full((stop - start,), float("nan"), dtype=dtype)
        ElementReader(folder, index).read_into(target, "w", "weight", start)
        assert torch.equal(target, whole[start:stop].to(dtype))


def test_pieces_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut for 1,000 ranks and read for as many: each read must not go through all pieces."""
    whole = torch.arange(3000.0)
    pieces = [Piece(0, start, start + 3) for start in range(0, 3000, 3)]
    items = [
        item_of(tensor_key("w", "weight", p.start, p.stop, None), whole[p.start : p.stop]) for p in pieces
    ]
    entry = write_file(tmp_path / "a.safetensors", items, {})
    tensor = TensorEntry((30, 100), "float32", pieces)
    reader = ElementReader(tmp_path, index_of({"w": ParameterEntry((30, 100), {"weight": tensor})}, [entry]))
    looked_at = []
    monkeypatch.setattr(module, "blocks", lambda *where: looked_at.append(where) or blocks(*where))
    for start, stop, number in ((0, 3, 1), (2, 4, 2), (1000, 1010, 4), (2999, 3000, 1)):
        looked_at.clear()
        target = torch.empty(stop - start)
        reader.read_into(target, "w", "weight", start)
        assert torch.equal(target, whole[start:stop])
        assert len(looked_at) == 1 + number  # what is wanted, and the pieces that have some of it


def test_the_index_survives_the_round_trip(tmp_path: Path) -> None:
    tensors = {"weight": TensorEntry((2, 3), "float32", [Piece(0, 0, 4), Piece(1, 4, 6)])}
    parameters = {
        "a.weight": ParameterEntry((2, 3), tensors, {"step": 3.0}),
        "scalar": ParameterEntry((), {}, {}),
    }
    index = index_of(parameters, [FileEntry("x", 1, "2"), FileEntry("y", 3, "4")])
    (tmp_path / "index.json").write_text(encode_index(index), encoding="utf-8")
    assert asdict(read_index(tmp_path)) == asdict(index)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [(0, 0, 5)],
        [(0, 1, 6)],
        [(0, 0, 4), (0, 3, 6)],
        [(0, 0, 2), (0, 4, 6)],
        [(0, 0, 7)],
        [(1, 0, 6)],
        [(0, 0, 0)],
    ],
)
def test_pieces_must_cover_a_tensor_once(pieces: list[tuple[int, int, int]]) -> None:
    entry = TensorEntry((2, 3), "float32", [Piece(*piece) for piece in pieces])
    index = index_of({"a": ParameterEntry((2, 3), {"weight": entry})}, [FileEntry("x", 1, "2")])
    with pytest.raises(CheckpointError, match="does not cover weight of a"):
        check_complete(index, Path("somewhere"))


def test_reading_weights_needs_no_deepspeed() -> None:
    code = "import sys; from megatron_lite.checkpoint import read_weights; print('deepspeed' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "False\n"
