"""Files of elements: written as a stream in the safetensors format, read by ranges.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, JSON header,
data). The library's own writer copies every tensor once more in memory before it writes the first byte; here
a rank's share of a large model is written with the memory of one fragment.
"""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.index import FileEntry, Index, Piece, read_index, tensor_key
from megatron_lite.checkpoint.regions import Overlap, Region, blocks, overlap
from megatron_lite.checkpoint.signs import Sign, unheard
from megatron_lite.utils.errors import CheckpointError

BLOCK = 1 << 20  # bytes per read while a checksum is computed: they stay in the cache
CHUNK = 16 << 20  # elements per read
WRITTEN = 16 << 20  # bytes per write
FLUSHED = 256 << 20  # bytes that are written between two waits for the disk

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of the dtypes that optimizers use."""


@dataclass(frozen=True)
class Item:
    """A tensor to write.

    Attributes:
        key: its key in the file.
        dtype: of its elements.
        numel: their number.
        read: gives them (1-D, any device) when their turn to be written has come.
    """

    key: str
    dtype: torch.dtype
    numel: int
    read: Callable[[], torch.Tensor]


def item_of(key: str, data: torch.Tensor) -> Item:
    """``data`` (1-D, any device) to be written."""
    return Item(key, data.dtype, data.numel(), lambda: data)


def write_file(path: Path, items: list[Item], metadata: dict[str, str], sign: Sign = unheard) -> FileEntry:
    """Write ``items`` to the new safetensors file ``path``, on disk (fsync) when this returns.

    Costs the memory of the largest item where :attr:`Item.read` or the way to the CPU makes a copy. The
    checksum is computed on the way. ``sign`` is told of every write. After every ``FLUSHED`` bytes this waits
    for the disk: the system would keep us waiting for all of them at the end.

    Raises:
        CheckpointError: it cannot be written (a full disk).
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for item in items:
        size = item.numel * item.dtype.itemsize
        header[item.key] = {
            "dtype": DTYPES[item.dtype],
            "shape": [item.numel],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    checksum = xxhash.xxh3_64()
    try:
        with open(path, "xb") as file:
            unflushed = 0
            for block in _blocks(struct.pack("<Q", len(text)) + text, items):
                sign(f"writing {path}")
                file.write(block)
                checksum.update(block)
                unflushed += len(block)
                del block  # before the next is read
                if unflushed >= FLUSHED:
                    _flush(file)
                    unflushed = 0
            _flush(file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    return FileEntry(path.name, 8 + len(text) + offset, checksum.hexdigest())


def _blocks(head: bytes, items: list[Item]) -> Iterable[bytes | memoryview]:
    yield head
    for item in items:
        if item.numel:
            data = item.read().detach().cpu().contiguous().view(torch.uint8).numpy().data
            for start in range(0, len(data), WRITTEN):
                yield data[start : start + WRITTEN]
            del data  # before the next is read


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_file(checkpoint: Path, entry: FileEntry, sign: Sign = unheard) -> None:
    """Raise :class:`CheckpointError` unless the file has the size and the checksum that the index says.

    ``sign`` is told of every read.
    """
    check_size(checkpoint, entry)
    checksum = xxhash.xxh3_64()
    with open(checkpoint / entry.name, "rb") as file:
        while block := file.read(BLOCK):
            sign(f"verifying {file.name}")
            checksum.update(block)
    if checksum.hexdigest() != entry.xxh3:
        raise CheckpointError(
            f"{checkpoint / entry.name} is corrupt: its checksum is wrong; use another checkpoint"
        )


def check_size(checkpoint: Path, entry: FileEntry) -> None:
    """Raise :class:`CheckpointError` unless the file is there with the size that the index says."""
    path = checkpoint / entry.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; use another checkpoint") from None
    if size != entry.bytes:
        raise CheckpointError(
            f"{path} has {size:,} bytes and should have {entry.bytes:,}: it is truncated or was changed; "
            "use another checkpoint"
        )


def _copy(source: Any, target: torch.Tensor, common: Overlap, sign: Callable[[], None]) -> None:
    """Copy a rectangle from a stored piece to ``target``, at most ``CHUNK`` elements at a time, each told."""
    (read, stride), (write, target_stride) = common.first, common.second
    step = max(1, CHUNK // stride)
    for column in range(0, common.columns, CHUNK):
        columns = min(CHUNK, common.columns - column)
        for row in range(0, common.rows, step):
            sign()
            rows = min(step, common.rows - row)
            first, place = read + row * stride + column, write + row * target_stride + column
            stored = source[first : first + (rows - 1) * stride + columns]
            wanted = target[place : place + (rows - 1) * target_stride + columns]
            size = (rows, columns)
            wanted.as_strided(size, (target_stride, 1)).copy_(stored.as_strided(size, (stride, 1)))


def _near(pieces: list[Piece], region: Region | None, start: int, stop: int) -> list[Piece]:
    """Those of a tensor's ``pieces``, ascending, that may have elements ``start`` … ``stop - 1`` of a region.

    Under ZeRO 3 each rank has one of every tensor: where tensor ranks do not divide it they are looked up.
    """
    if region is not None or pieces[0].region is not None:
        return pieces
    first = bisect_right(pieces, start, key=lambda piece: piece.stop)
    return pieces[first : bisect_left(pieces, stop, key=lambda piece: piece.start)]


class ElementReader:
    """Reads any range of elements of any tensor of a checkpoint, from memory-mapped files opened once.

    ``sign`` is told of every read, of at most ``CHUNK`` elements.
    """

    def __init__(self, checkpoint: Path, index: Index, sign: Sign = unheard) -> None:
        self.checkpoint = checkpoint
        self.index = index
        self._sign = sign
        self._open: dict[int, Any] = {}

    @classmethod
    def of(cls, checkpoint: Path) -> ElementReader:
        """The reader of ``checkpoint``; :class:`CheckpointError` when its index is not sound."""
        return cls(checkpoint, read_index(checkpoint))

    def read_into(
        self, target: torch.Tensor, name: str, kind: str, start: int, region: Region | None = None
    ) -> None:
        """Fill ``target`` (1-D, any dtype and device) with elements ``start, start + 1...`` of a tensor.

        With ``region``: of that part of it, flattened. The parts that the file has may be others.
        """
        entry = self.index.tensor(name, kind)
        pieces = _near(entry.pieces, region, start, start + target.numel())
        dims = [r.dim for r in (region, *(piece.region for piece in pieces)) if r is not None]
        dim = dims[0] if dims else 0
        wanted = blocks(entry.shape, dim, region, start, start + target.numel())
        with torch.no_grad():
            for piece in pieces:
                for stored in blocks(entry.shape, dim, piece.region, piece.start, piece.stop):
                    common = [found for block in wanted if (found := overlap(stored, block))]
                    if common:
                        key = tensor_key(name, kind, piece.start, piece.stop, piece.region)
                        source = self._slice(piece.file, key)
                        path = self.checkpoint / self.index.files[piece.file].name
                        for each in common:
                            _copy(source, target, each, partial(self._sign, f"reading {path}"))

    def chunks(self, name: str, kind: str, piece: Piece) -> Iterator[torch.Tensor]:
        """The elements of a stored piece of a tensor, at most ``CHUNK`` at a time (1-D, in its dtype)."""
        source = self._slice(piece.file, tensor_key(name, kind, piece.start, piece.stop, piece.region))
        for start in range(0, piece.stop - piece.start, CHUNK):
            yield source[start : start + CHUNK]

    def contents(self, file: int) -> dict[str, tuple[str, list[int]]]:
        """By key, safetensors' name of the dtype and the shape of what is stored in file number ``file``."""
        opened = self._file(file)
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no dict)
        return {key: (each.get_dtype(), each.get_shape()) for key, each in slices.items()}

    def metadata(self, file: int) -> dict[str, str]:
        """The strings stored with file number ``file``."""
        return self._file(file).metadata() or {}

    def _slice(self, file: int, key: str) -> Any:
        try:
            return self._file(file).get_slice(key)
        except SafetensorError as error:
            path = self.checkpoint / self.index.files[file].name
            raise CheckpointError(f"{path} is corrupt ({error}); use another checkpoint") from None

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.checkpoint / self.index.files[number].name
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None
        return self._open[number]
