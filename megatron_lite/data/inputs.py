"""Text as it lies on disk: JSON lines and text files, plain or compressed, in chunks of whole records."""

from __future__ import annotations

import glob
import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import orjson
import zstandard

from megatron_lite.utils.errors import DataError

JSON_LINES = {".jsonl", ".json", ".ndjson"}
"""Endings of files with one JSON object a line; any other file is one document of text."""


class ByteStream(Protocol):
    """What is read of a file, once it is decompressed."""

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes, or the rest."""


class ZstdReader:
    """Decompressed bytes of a file of one or more Zstandard frames.

    zstandard's own stream reader takes a file that breaks off for one that ends; this one raises EOFError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._rest = b""
        self._inside = False

    def read(self, size: int = -1, /) -> bytes:
        """About ``size`` bytes or more (the rest if negative), b"" at the end."""
        parts: list[bytes] = []
        length = 0
        while size < 0 or length < size:
            block = self._rest or self._file.read(COMPRESSED_BLOCK)
            if not block:
                if self._inside:
                    raise EOFError("its last frame breaks off")
                break
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(self._frame.decompress(block))
            length += len(parts[-1])
            self._rest = self._frame.unused_data
            self._inside = not self._frame.eof
        return b"".join(parts)


DECOMPRESSORS: dict[str, Callable[[BinaryIO], ByteStream]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".zst": ZstdReader,
}
"""Ending → reader. A new compression is a line here."""

COMPRESSED_BLOCK = 1 << 18
"""Bytes of a Zstandard file decompressed at once."""

CHUNK_BYTES = 4 << 20
"""Text in a chunk: large enough to hide the cost of passing it to another process, small enough to spread."""


@dataclass(frozen=True)
class Chunk:
    """Some records of one file.

    Attributes:
        path: the file.
        first_line: line number of the first record, from 1; 0 when the file is one document of text.
        records: lines of JSON, or the one document, as bytes.
        position: bytes of the file (as it lies on disk) read when the chunk was complete.
    """

    path: Path
    first_line: int
    records: list[bytes]
    position: int


def find_inputs(names: Sequence[str]) -> list[Path]:
    """The files that ``names`` mean, in order: files, folders (every file below, sorted), glob patterns, and
    several of these separated by commas.

    Raises:
        DataError: a name means no file.
    """
    files: list[Path] = []
    for name in names:
        parts = [name] if Path(name).exists() else [part for part in name.split(",") if part]
        for part in parts:
            path = Path(part)
            if path.is_dir():
                found = sorted(
                    entry for entry in path.rglob("*") if entry.is_file() and not is_hidden(entry, path)
                )
            elif path.exists():
                found = [path]
            else:
                found = [
                    Path(match) for match in sorted(glob.glob(part, recursive=True)) if Path(match).is_file()
                ]
            if not found:
                raise DataError(f"--input {part}: there is no such file, no file in that folder, no match")
            files += found
    return files


def is_hidden(path: Path, below: Path) -> bool:
    """Whether a part of ``path`` under ``below`` begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def read_chunks(paths: Sequence[Path]) -> Iterator[Chunk]:
    """Every record of ``paths``, in order.

    Raises:
        DataError: a compressed file is damaged.
    """
    for path in paths:
        decompress = DECOMPRESSORS.get(path.suffix)
        is_lines = (path.with_suffix("") if decompress else path).suffix in JSON_LINES
        with open(path, "rb") as file:
            stream: ByteStream = decompress(file) if decompress else file
            try:
                if is_lines:
                    yield from _line_chunks(path, file, stream)
                else:
                    yield Chunk(path, 0, [stream.read()], path.stat().st_size)
            except (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
                raise DataError(
                    f"{path} is not a whole {path.suffix} file ({error}): copy it again"
                ) from None


def _line_chunks(path: Path, file: BinaryIO, stream: ByteStream) -> Iterator[Chunk]:
    """Blocks of about CHUNK_BYTES, each cut after its last newline."""
    line, rest = 1, b""
    while block := stream.read(CHUNK_BYTES):
        whole, newline, tail = block.rpartition(b"\n")
        if not newline:
            rest += block
            continue
        records = (rest + whole).split(b"\n")
        yield Chunk(path, line, records, file.tell())
        line += len(records)
        rest = tail
    if rest:
        yield Chunk(path, line, [rest], file.tell())


def texts_of(chunk: Chunk, keys: Sequence[str]) -> dict[str, list[str]]:
    """The texts of ``chunk`` under each of ``keys``; blank lines are skipped. A text file has the key "text".

    Raises:
        DataError: a record is not UTF-8, not a JSON object, or lacks a key; file and line are in the message.
    """
    texts: dict[str, list[str]] = {key: [] for key in keys}
    for offset, record in enumerate(chunk.records):
        document: dict[str, object]
        if chunk.first_line == 0:
            document = {"text": decode_text(record, chunk.path)}
        elif record.strip():
            document = parse_line(record, f"{chunk.path}, line {chunk.first_line + offset}")
        else:
            continue
        for key in keys:
            text = document.get(key)
            if not isinstance(text, str):
                where = (
                    f"{chunk.path}, line {chunk.first_line + offset}" if chunk.first_line else f"{chunk.path}"
                )
                raise DataError(
                    f"{where}: there is no text under the key {key!r} (keys: {', '.join(document)}): "
                    f"correct --jsonl-keys or the input"
                )
            texts[key].append(text)
    return texts


def decode_text(record: bytes, path: Path) -> str:
    """A text file's content."""
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out"
        ) from None


def parse_line(line: bytes, where: str) -> dict[str, object]:
    """The JSON object in ``line``."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}): correct or delete the line") from None
    if not isinstance(document, dict):
        raise DataError(f"{where}: not a JSON object but {type(document).__name__}: write one object a line")
    return document
