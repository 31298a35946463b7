"""The index of a checkpoint: which file holds which elements of which tensor.

The index knows parameters and their state by global name and whole shape; nothing in it depends on the ZeRO
stage or on the number of ranks that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_lite.checkpoint.regions import Region, elements
from megatron_lite.utils.errors import CheckpointError

INDEX_NAME = "index.json"
FORMAT = "megatron_lite checkpoint"
VERSION = 3
CHECKSUM = "checksum"
"""The key of the index's checksum of itself."""
IMPORTED = "none (imported)"
"""The optimizer of a checkpoint that no run wrote: it has weights only."""
WEIGHT = "weight"
"""The kind of the parameter itself (the fp32 master where training keeps one)."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint: its name, its size in bytes, and the XXH3 (64 bits, hex) of its bytes."""

    name: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, stop)`` of a flattened tensor, stored in file number ``file`` of the index.

    Of a tensor that was divided over tensor-parallel ranks: of the flattened ``region`` of it.
    """

    file: int
    start: int
    stop: int
    region: Region | None = None


@dataclass
class TensorEntry:
    """One tensor: its whole shape, its dtype by torch's name (``float32``), and where its elements are."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[Piece]


@dataclass
class ParameterEntry:
    """One parameter under its global name.

    Attributes:
        shape: its whole shape.
        tensors: by kind: ``weight``, and each tensor of its optimizer state (``exp_avg``...).
        scalars: by kind, the numbers of its optimizer state (``step``).
    """

    shape: tuple[int, ...]
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)

    @property
    def state_kinds(self) -> set[str]:
        """The kinds of its optimizer state; empty when the optimizer never touched it."""
        return (self.tensors.keys() | self.scalars.keys()) - {WEIGHT}


@dataclass
class Index:
    """Everything about a checkpoint but the elements.

    Attributes:
        step: optimizer steps done.
        world_size: ranks that wrote it.
        optimizer: class name of the optimizer.
        trainer_state: what the trainer handed over (step, samples, data position...).
        config: the run's flat keys.
        engine: DeepSpeed's counters (``global_steps``...).
        loss_scaler: dynamic loss scale and its counters; empty without one.
        versions: versions of the packages that wrote it.
        files: by number, as pieces refer to them.
        parameters: by global name.
    """

    step: int
    world_size: int
    optimizer: str
    trainer_state: dict[str, Any]
    config: dict[str, Any]
    engine: dict[str, int]
    loss_scaler: dict[str, float]
    versions: dict[str, str]
    files: list[FileEntry]
    parameters: dict[str, ParameterEntry]

    @property
    def has_optimizer_state(self) -> bool:
        """Whether any parameter carries optimizer state (a checkpoint of step 0 may have none)."""
        return any(entry.state_kinds for entry in self.parameters.values())

    def tensor(self, name: str, kind: str) -> TensorEntry:
        """The entry of state ``kind`` of parameter ``name``."""
        return self.parameters[name].tensors[kind]


def tensor_key(name: str, kind: str, start: int, stop: int, region: Region | None) -> str:
    """The name of a piece inside its safetensors file."""
    if region is None:
        return f"{kind}/{name}[{start}:{stop}]"
    ranges = ",".join(f"{first}:{last}" for first, last in region.ranges)
    return f"{kind}/{name}(dim {region.dim} {ranges})[{start}:{stop}]"


def check_complete(index: Index, where: Path) -> None:
    """Raise :class:`CheckpointError` unless the pieces of every tensor cover it exactly once."""
    for name, kind, entry in _tensors(index):
        entry.pieces.sort(key=lambda piece: piece.start)
        if not _covers(entry) or not all(0 <= piece.file < len(index.files) for piece in entry.pieces):
            raise CheckpointError(
                f"{where / INDEX_NAME} does not cover {kind} of {name}: elements are missing or there twice; "
                "use another checkpoint"
            )


def _covers(entry: TensorEntry) -> bool:
    """Whether the regions cover the tensor, and the pieces of each cover the region, exactly once."""
    by_region: dict[Region | None, list[tuple[int, int]]] = {}
    for piece in entry.pieces:
        by_region.setdefault(piece.region, []).append((piece.start, piece.stop))
    if not all(_tiles(ranges, elements(entry.shape, region)) for region, ranges in by_region.items()):
        return False
    regions = [region for region in by_region if region is not None]
    if not regions:
        return None in by_region
    dim = regions[0].dim
    if None in by_region or any(region.dim != dim for region in regions):
        return False
    return _tiles(sorted(span for region in regions for span in region.ranges), entry.shape[dim])


def _tiles(ranges: list[tuple[int, int]], length: int) -> bool:
    """Whether ``ranges``, ascending, follow each other from 0 to ``length``."""
    position = 0
    for start, stop in ranges:
        if start != position or stop <= start:
            return False
        position = stop
    return position == length


def _tensors(index: Index) -> Iterable[tuple[str, str, TensorEntry]]:
    for name, parameter in index.parameters.items():
        for kind, entry in parameter.tensors.items():
            yield name, kind, entry


def encode_index(index: Index) -> str:
    """The text of ``index.json``: one line per parameter, so that a person can read and diff it.

    Its last key is the checksum of the others (:func:`_checksum`).
    """
    head = {
        "format": FORMAT,
        "format_version": VERSION,
        "step": index.step,
        "world_size": index.world_size,
        "optimizer": index.optimizer,
        "trainer_state": index.trainer_state,
        "engine": index.engine,
        "loss_scaler": index.loss_scaler,
        "versions": index.versions,
        "config": index.config,
        "files": [asdict(entry) for entry in index.files],
    }
    lines = [
        f"{json.dumps(name)}: {json.dumps(_encode_parameter(p))}" for name, p in index.parameters.items()
    ]
    parameters = "{\n    " + ",\n    ".join(lines) + "\n  }"
    text = json.dumps(head, indent=2)[:-2] + f',\n  "parameters": {parameters}'
    return text + f',\n  "{CHECKSUM}": "{_checksum(json.loads(text + "}"))}"\n}}\n'


def _checksum(content: dict[str, Any]) -> str:
    """The XXH3 of the index without its own checksum, as JSON with sorted keys and no spaces."""
    bare = {key: value for key, value in content.items() if key != CHECKSUM}
    return xxhash.xxh3_64_hexdigest(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode())


def _encode_parameter(parameter: ParameterEntry) -> dict[str, Any]:
    tensors = {
        kind: {
            "shape": entry.shape,
            "dtype": entry.dtype,
            "pieces": [_encode_piece(piece) for piece in entry.pieces],
        }
        for kind, entry in parameter.tensors.items()
    }
    return {"shape": parameter.shape, "tensors": tensors, "scalars": parameter.scalars}


def _encode_piece(piece: Piece) -> list[Any]:
    """[file, start, stop], and of a region its dimension and ranges."""
    own = [piece.file, piece.start, piece.stop]
    return own if piece.region is None else [*own, piece.region.dim, piece.region.ranges]


def _decode_piece(content: list[Any]) -> Piece:
    file, start, stop, *rest = content
    if not rest:
        return Piece(file, start, stop)
    dim, ranges = rest
    return Piece(file, start, stop, Region(dim, tuple((first, last) for first, last in ranges)))


def read_index(checkpoint: Path) -> Index:
    """The index of the checkpoint folder ``checkpoint``; :class:`CheckpointError` when it is not sound."""
    path = checkpoint / INDEX_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no {INDEX_NAME}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the index of a {FORMAT}")
    if content.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('format_version')} and this program reads {VERSION}; "
            "use the version of the program that wrote it"
        )
    try:
        index = _decode(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged, or newer than this program ({error!r})") from None
    check_complete(index, checkpoint)
    if content.get(CHECKSUM) != _checksum(content):
        raise CheckpointError(
            f"{path} is corrupt or was changed: its checksum is wrong; use another checkpoint"
        )
    return index


def _decode(content: dict[str, Any]) -> Index:
    return Index(
        step=content["step"],
        world_size=content["world_size"],
        optimizer=content["optimizer"],
        trainer_state=content["trainer_state"],
        config=content["config"],
        engine=content["engine"],
        loss_scaler=content["loss_scaler"],
        versions=content["versions"],
        files=[FileEntry(**entry) for entry in content["files"]],
        parameters={name: _decode_parameter(entry) for name, entry in content["parameters"].items()},
    )


def _decode_parameter(content: dict[str, Any]) -> ParameterEntry:
    tensors = {
        kind: TensorEntry(
            tuple(entry["shape"]), entry["dtype"], [_decode_piece(piece) for piece in entry["pieces"]]
        )
        for kind, entry in content["tensors"].items()
    }
    return ParameterEntry(tuple(content["shape"]), tensors, content["scalars"])
