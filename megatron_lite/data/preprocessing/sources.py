"""Inputs by name, and how each is cut into tasks: pieces of whole records that a worker encodes alone.

A task's bounds depend on the input alone, so the output does not depend on the number of workers. Files that
can be read from any place are cut by byte range, row group or file, and workers read them; what must be read
from its beginning (compressed files, archives, standard input) is read by the parent, who hands the bytes on.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megatron_lite.data.preprocessing.streams import DECOMPRESSORS, ByteStream, damage_named
from megatron_lite.utils.errors import DataError

TASK_BYTES = 2 << 20
"""Text in a task: enough to hide what passing it around costs, little enough that the arrays made of it come
from memory that the process has already (larger ones are mapped and cleared anew each time)."""

STANDARD_INPUT = "-"

FORMATS = {
    ".jsonl": "lines",
    ".json": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "tar",
    ".dat": "dat",
}
"""Ending → format; what has none of these is text."""

DESCRIPTIONS = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
"""Files beside the Arrow files in a folder that the datasets library has saved."""

SHORT_TAR_ENDINGS = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}


@dataclass(frozen=True)
class Task:
    """Some records of one source.

    Attributes:
        source: number of the source.
        chunk: number of the task in its source, from 0.
        kind: how :mod:`.records` reads it.
        place: the file, for messages; lines are counted anew where it changes.
        start: first byte, or row group, or record batch of ``place``.
        end: the one after the last.
        payload: the records themselves where the parent has read them: lines, or a list of documents.
        files: text files, each a document.
        position: bytes of the source on disk that are read once this task is.
    """

    source: int
    chunk: int
    kind: str
    place: str
    start: int = 0
    end: int = 0
    payload: bytes | list[bytes] | None = None
    files: tuple[Path, ...] = ()
    position: int = 0


@dataclass(frozen=True)
class Source:
    """A file, a run of text files, standard input or a data set of the datasets library.

    Attributes:
        index: its number in the order of input.
        format: key of :data:`READERS`.
        name: path or name.
        files: the files it is made of.
        separator: what divides a text file into documents; None: the file is one.
    """

    index: int
    format: str
    name: str
    files: tuple[Path, ...] = ()
    separator: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes on disk; 0 when they are not known."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def can_be_read_again(self) -> bool:
        """Whether a killed run can go on in the middle of it."""
        return self.name != STANDARD_INPUT

    def tasks(self, first_chunk: int = 0) -> Iterator[Task]:
        """Its tasks from number ``first_chunk`` on.

        Raises:
            DataError: a compressed file or an archive is damaged.
        """
        if self.files and self.size == 0 and self.format != "text":
            tasks = iter([Task(self.index, 0, "empty", self.name)])
        else:
            tasks = READERS[self.format](self)
        return (task for task in tasks if task.chunk >= first_chunk)


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
    """Whether a part of ``path`` under ``below`` begins with a dot, or it only describes a data set."""
    return path.name in DESCRIPTIONS or any(part.startswith(".") for part in path.relative_to(below).parts)


def find_sources(names: Sequence[str], separator: str | None = None) -> list[Source]:
    """The sources that ``names`` mean: as :func:`find_inputs`, ``-`` (standard input: JSON lines) and
    ``hf:NAME[:SPLIT]`` (a data set of the datasets library).

    Raises:
        DataError: a name means nothing, or nothing is named twice as standard input can be.
    """
    cut = separator.encode() if separator else None
    sources: list[Source] = []
    for name in names:
        if name == STANDARD_INPUT or name.startswith("hf:"):
            kind = "standard input" if name == STANDARD_INPUT else "dataset"
            sources.append(Source(len(sources), kind, name))
            continue
        for path in find_inputs([name]):
            format = format_of(path.name)
            if format == "text" and cut is not None:
                format = "separated"
            last = sources[-1] if sources else None
            if format == "text" and last is not None and last.format == "text":
                sources[-1] = replace(last, files=(*last.files, path))
            else:
                sources.append(Source(len(sources), format, str(path), (path,), cut))
    if sum(source.name == STANDARD_INPUT for source in sources) > 1:
        raise DataError("--input names standard input (-) twice: name it once")
    return sources


def split_compression(name: str) -> tuple[str, str]:
    """``name`` without the ending of its compression, and that ending ("" if it is not compressed)."""
    path = PurePosixPath(name)
    if path.suffix in SHORT_TAR_ENDINGS:
        return path.stem + ".tar", SHORT_TAR_ENDINGS[path.suffix]
    return (path.stem, path.suffix) if path.suffix in DECOMPRESSORS else (name, "")


def format_of(name: str) -> str:
    """The format of a file by its name."""
    return FORMATS.get(PurePosixPath(split_compression(name)[0]).suffix, "text")


def decompressed(file: BinaryIO, name: str) -> ByteStream:
    """``file``, decompressed as the ending of ``name`` says."""
    ending = split_compression(name)[1]
    return DECOMPRESSORS[ending](file) if ending else file


def line_tasks(source: Source) -> Iterator[Task]:
    """JSON lines: ranges of a plain file, blocks of a compressed one. A file that is one array: one task."""
    path = source.files[0]
    ending = split_compression(path.name)[1]
    size = source.size
    with open(path, "rb") as file, damage_named(str(path), ending):
        if decompressed(file, path.name).read(64).lstrip()[:1] == b"[":
            yield Task(source.index, 0, "array", str(path), position=size)
            return
        if not ending:
            for chunk, start in enumerate(range(0, size, TASK_BYTES)):
                end = min(start + TASK_BYTES, size)
                yield Task(source.index, chunk, "lines", str(path), start, end, position=end)
            return
        file.seek(0)
        for chunk, block in enumerate(whole_lines(decompressed(file, path.name))):
            yield Task(source.index, chunk, "lines", str(path), payload=block, position=file.tell())


def whole_lines(stream: ByteStream) -> Iterator[bytes]:
    """Blocks of about TASK_BYTES, each cut after its last newline."""
    parts: list[bytes] = []
    length = 0
    while block := stream.read(max(1, TASK_BYTES - length)):
        parts.append(block)
        length += len(block)
        if length < TASK_BYTES:
            continue
        cut = block.rfind(b"\n") + 1
        if cut:
            parts[-1] = block[:cut]
            yield b"".join(parts)
            parts, length = [block[cut:]], len(block) - cut
        else:
            length = 0  # a line longer than a block: read on by whole blocks
    if any(parts):
        yield b"".join(parts)


def text_tasks(source: Source) -> Iterator[Task]:
    """Text files, each a document: together until they are TASK_BYTES."""
    group: list[Path] = []
    chunk = length = position = 0
    for path in source.files:
        group.append(path)
        size = path.stat().st_size
        length += size
        position += size
        if length >= TASK_BYTES or path is source.files[-1]:
            yield Task(source.index, chunk, "files", source.name, files=tuple(group), position=position)
            group, length, chunk = [], 0, chunk + 1


def separated_tasks(source: Source) -> Iterator[Task]:
    """A text file cut at the separator; what is empty between two separators is no document."""
    assert source.separator is not None
    path = source.files[0]
    with open(path, "rb") as file, damage_named(str(path), split_compression(path.name)[1]):
        pieces = separated(decompressed(file, path.name), source.separator)
        for chunk, documents in enumerate(grouped(pieces)):
            yield Task(source.index, chunk, "documents", str(path), payload=documents, position=file.tell())


def separated(stream: ByteStream, separator: bytes) -> Iterator[bytes]:
    """The non-empty pieces of ``stream``, left to right."""
    rest = b""
    while block := stream.read(TASK_BYTES):
        *pieces, rest = (rest + block).split(separator)
        yield from filter(None, pieces)
    if rest:
        yield rest


def grouped(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    """``documents`` in lists of TASK_BYTES together."""
    group: list[bytes] = []
    length = 0
    for document in documents:
        group.append(document)
        length += len(document)
        if length >= TASK_BYTES:
            yield group
            group, length = [], 0
    if group:
        yield group


def read_whole(stream: ByteStream) -> bytes:
    """Everything in ``stream``."""
    return b"".join(iter(lambda: stream.read(TASK_BYTES), b""))


def parquet_tasks(source: Source) -> Iterator[Task]:
    """Row groups of a Parquet file."""
    from megatron_lite.data.preprocessing.tables import row_groups

    path = source.files[0]
    count = row_groups(path)
    for group in range(count):
        position = source.size * (group + 1) // count
        yield Task(source.index, group, "parquet", str(path), group, group + 1, position=position)


def arrow_tasks(source: Source) -> Iterator[Task]:
    """Record batches of an Arrow file, TASK_BYTES together."""
    from megatron_lite.data.preprocessing.tables import arrow_ranges

    path = source.files[0]
    for chunk, (start, end, position) in enumerate(arrow_ranges(path, TASK_BYTES)):
        yield Task(source.index, chunk, "arrow", str(path), start, end, position=position)


def tar_tasks(source: Source) -> Iterator[Task]:
    """A tar archive, see :mod:`.archives`."""
    from megatron_lite.data.preprocessing.archives import tar_tasks

    return tar_tasks(source)


def dat_tasks(source: Source) -> Iterator[Task]:
    """An archive of lm_dataformat, see :mod:`.archives`."""
    from megatron_lite.data.preprocessing.archives import dat_tasks

    return dat_tasks(source)


def standard_input_tasks(source: Source) -> Iterator[Task]:
    """JSON lines from standard input."""
    for chunk, block in enumerate(whole_lines(sys.stdin.buffer)):
        yield Task(source.index, chunk, "lines", "standard input", payload=block)


def dataset_tasks(source: Source) -> Iterator[Task]:
    """Rows of a data set of the datasets library, streamed."""
    from megatron_lite.data.preprocessing.tables import dataset_lines

    for chunk, lines in enumerate(grouped(dataset_lines(source.name.removeprefix("hf:")))):
        yield Task(source.index, chunk, "lines", source.name, payload=b"".join(lines))


READERS: dict[str, Callable[[Source], Iterator[Task]]] = {
    "lines": line_tasks,
    "text": text_tasks,
    "separated": separated_tasks,
    "parquet": parquet_tasks,
    "arrow": arrow_tasks,
    "tar": tar_tasks,
    "dat": dat_tasks,
    "standard input": standard_input_tasks,
    "dataset": dataset_tasks,
}
"""Format → its tasks. A new format is a line here, a kind of task in :mod:`.records` and an ending."""
