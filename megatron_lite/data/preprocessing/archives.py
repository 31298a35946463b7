"""Archives of documents: tar, and lm_dataformat's own."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from megatron_lite.data.preprocessing import sources
from megatron_lite.data.preprocessing.sources import (
    Source,
    Task,
    decompressed,
    format_of,
    grouped,
    read_whole,
    split_compression,
    whole_lines,
)
from megatron_lite.data.preprocessing.streams import ByteStream, damage_named
from megatron_lite.utils.errors import DataError


class StrictTarInfo(tarfile.TarInfo):
    """A member's header. tarfile takes a damaged header, or none, for the end; only a block of zeros is."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictTarInfo:
        """As tarfile's. Raises ReadError for a header that is none."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def tar_tasks(source: Source) -> Iterator[Task]:
    """Members of a tar archive in order: JSON lines (compressed or not) as such, any other a document."""
    path = source.files[0]
    with open(path, "rb") as file, damage_named(str(path), split_compression(path.name)[1] or ".tar"):
        stream = decompressed(file, path.name)
        try:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:  # type: ignore[call-overload]
                for chunk, task in enumerate(member_tasks(source, archive)):
                    yield replace(task, chunk=chunk, position=file.tell())
            while stream.read(sources.TASK_BYTES):
                pass  # to its end, where a compressed file has its checksum
        except tarfile.TarError as error:
            raise DataError(f"{path} is not a whole tar archive ({error}): copy it again") from None


def member_tasks(source: Source, archive: tarfile.TarFile) -> Iterator[Task]:
    """The tasks of ``archive``'s files, numbered by none."""
    documents: list[bytes] = []
    length = 0
    for member in archive:
        name = PurePosixPath(member.name)
        if not member.isfile() or name.name.startswith("."):
            continue
        file = archive.extractfile(member)
        assert file is not None
        stream = decompressed(file, name.name)  # type: ignore[arg-type]
        is_lines = format_of(name.name) == "lines"
        if documents and (is_lines or length >= sources.TASK_BYTES):
            yield Task(source.index, 0, "documents", source.name, payload=documents)
            documents, length = [], 0
        if is_lines:
            for block in whole_lines(stream):
                yield Task(source.index, 0, "lines", f"{source.name}: {member.name}", payload=block)
        else:
            documents.append(read_whole(stream))
            length += len(documents[-1])
    if documents:
        yield Task(source.index, 0, "documents", source.name, payload=documents)


def dat_tasks(source: Source) -> Iterator[Task]:
    """lm_dataformat's ``.dat.zst``: 16 digits of length before each document."""
    path = source.files[0]
    with open(path, "rb") as file, damage_named(str(path), split_compression(path.name)[1] or ".dat"):
        documents = dat_documents(decompressed(file, path.name), path)
        for chunk, group in enumerate(grouped(documents)):
            yield Task(source.index, chunk, "documents", str(path), payload=group, position=file.tell())


def dat_documents(stream: ByteStream, path: Path) -> Iterator[bytes]:
    """The documents of a ``.dat`` stream."""
    buffer = b""
    ended = False
    start = 0
    while True:
        needed = 16
        if len(buffer) - start >= 16:
            digits = buffer[start : start + 16]
            if not digits.isdigit():
                raise DataError(
                    f"{path} is not an archive of lm_dataformat (a length is {digits!r}): leave it out"
                )
            needed += int(digits)
            if len(buffer) - start >= needed:
                yield buffer[start + 16 : start + needed]
                start += needed
                continue
        if ended:
            break
        # A damaged length may be of petabytes: no more than what is there already is asked for at once.
        block = stream.read(max(sources.TASK_BYTES, min(needed, len(buffer))))
        ended = not block
        buffer, start = buffer[start:] + block, 0
    if start < len(buffer):
        raise DataError(f"{path} breaks off in a document: copy it again")
