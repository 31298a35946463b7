"""The folder of an unfinished run: tokens so far, and a journal of the tasks that are in them.

``PREFIX.partial/`` holds, for each key, the tokens and the documents' lengths, and ``journal``: a first line
that says of what the run is made, then a line for each task, in input order, with the totals after it and the
checksums of the files up to there. A run that is killed leaves it; the next one checks the files against the
lines, goes on after the last task that is whole, and so ends with the same bytes as one that was not killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_lite.data.indexed import bin_path, idx_path, write_index
from megatron_lite.data.preprocessing.facts import facts_path, file_checksum, write_facts
from megatron_lite.data.preprocessing.workers import Counted, Outputs
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import fsync_directory

LOCK_SECONDS = 30.0
"""A killed run's processes may live on so long in the worst case, and hold the lock."""

READ_BYTES = 1 << 18
"""Read at once for a checksum: what fits into a processor's cache."""

SYNC_BYTES = 64 << 20
"""So much of a file is sent to the disk at a time, while the workers go on."""


@dataclass
class KeyTotals:
    """What the files of one key hold."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    smallest: int | None = None
    largest: int | None = None


@dataclass
class Totals:
    """What is done after a task.

    Attributes:
        source: the task's source.
        chunk: its number there (-1: none is done).
        place: where its lines are counted.
        lines: lines of ``place`` done.
        position: bytes of all inputs done.
        records: records that became documents.
        bad: broken ones.
        dropped: those that a setting left out.
        keys: key → totals.
    """

    source: int = 0
    chunk: int = -1
    place: str = ""
    lines: int = 0
    position: int = 0
    records: int = 0
    bad: int = 0
    dropped: int = 0
    keys: dict[str, KeyTotals] = field(default_factory=dict)

    def add(self, counted: Counted) -> None:
        """Add a task's counts."""
        self.lines += counted.lines
        self.records += counted.records
        self.bad += counted.bad_count
        self.dropped += counted.dropped
        for key, totals in self.keys.items():
            totals.tokens += counted.tokens[key]
            totals.documents += counted.documents[key]
            totals.text_bytes += counted.text_bytes[key]
            totals.smallest = least(totals.smallest, counted.smallest[key])
            totals.largest = most(totals.largest, counted.largest[key])

    @property
    def tokens(self) -> int:
        """Tokens of all keys."""
        return sum(totals.tokens for totals in self.keys.values())


def least(first: int | None, second: int | None) -> int | None:
    """The smaller, where None is no number."""
    return min((number for number in (first, second) if number is not None), default=None)


def most(first: int | None, second: int | None) -> int | None:
    """The larger, where None is no number."""
    return max((number for number in (first, second) if number is not None), default=None)


class PartFile:
    """A file that grows, with the checksum of what is done.

    The kernel would keep a gigabyte or more in memory, and the end of the run would wait for all of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, "sync")
        self._syncing: Future[None] | None = None
        self._synced = 0
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.size = 0
        self.digest = xxhash.xxh3_128()
        self._buffer = bytearray(READ_BYTES)

    def advance(self, size: int) -> bool:
        """Take the file's bytes up to ``size`` into the checksum; False if they are not there."""
        while self.size < size:
            block = memoryview(self._buffer)[: size - self.size]
            length = os.preadv(self.descriptor, [block], self.size)
            if not length:
                return False
            self.digest.update(block[:length])
            self.size += length
        return True

    def sync_ahead(self) -> None:
        """Send what has come to the disk, if it is much; does not wait. Raises OSError if that has failed."""
        if self._syncing is not None and not self._syncing.done():
            return
        if self.size - self._synced >= SYNC_BYTES:
            self._wait()
            self._syncing, self._synced = self._thread.submit(os.fdatasync, self.descriptor), self.size

    def sync(self) -> None:
        """Wait until all is on the disk."""
        self._wait()
        os.fsync(self.descriptor)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def close(self) -> None:
        """Close the file."""
        self._thread.shutdown()
        os.close(self.descriptor)


class Journal:
    """The unfinished run at ``folder``, new or found there.

    Args:
        folder: ``PREFIX.partial``.
        identity: whatever the output depends on, as a digest.
        prefixes: key → prefix of its output.
        dtype: of the tokens.
        start_over: drop what a killed run has left.

    Raises:
        DataError: the folder is of a run with another ``identity``, or another process is at it.
    """

    def __init__(
        self, folder: Path, identity: str, prefixes: dict[str, Path], dtype: np.dtype, start_over: bool
    ) -> None:
        self.folder = folder
        self._prefixes = prefixes
        self._dtype = dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(folder / "journal", "a+b")  # noqa: SIM115 (closed by close)
        try:
            self._lock()
            self._file.seek(0)
            lines = self._file.read().split(b"\n")[:-1]  # what follows the last newline is half a line
            if start_over:
                lines = []
            if lines and json.loads(lines[0]) != identity:
                raise DataError(
                    f"{folder} is of an unfinished run with other inputs or options: give the same to "
                    "continue it, or delete the folder to start anew"
                )
        except BaseException:
            self._file.close()
            raise
        self.finished: bool = bool(lines) and lines[-1] == b'"finished"'
        self.totals = Totals(keys={key: KeyTotals() for key in prefixes})
        self._files: dict[str, tuple[PartFile, PartFile]] = {}
        if self.finished:
            return
        self._files = {
            key: (PartFile(folder / f"{number}.bin"), PartFile(folder / f"{number}.lengths"))
            for number, key in enumerate(prefixes)
        }
        kept = self._check(lines[1:])
        self._file.truncate(0)
        self._append(json.dumps(identity).encode(), *kept)

    def _lock(self) -> None:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DataError(f"another process is writing {self.folder}: wait until it ends") from None
                time.sleep(0.05)

    def _check(self, lines: Sequence[bytes]) -> list[bytes]:
        """Set ``totals`` to the last of ``lines`` to which the files agree; return those up to it.

        Its cost is reading the files once. What a power cut took away is noticed here.
        """
        for number, line in enumerate(lines):
            entry: dict[str, Any] = json.loads(line)
            checksums = entry.pop("checksums")
            keys = {key: KeyTotals(**totals) for key, totals in entry.pop("keys").items()}
            if not self._agree(keys, checksums):
                # The checksums have gone past the last good line: read again up to it.
                for part in (part for parts in self._files.values() for part in parts):
                    part.size, part.digest = 0, xxhash.xxh3_128()
                self._advance(self.totals.keys)
                return list(lines[:number])
            self.totals = Totals(**entry, keys=keys)
        return list(lines)

    def _advance(self, keys: dict[str, KeyTotals]) -> bool:
        return all(
            self._files[key][0].advance(totals.tokens * self._dtype.itemsize)
            and self._files[key][1].advance(totals.documents * 4)
            for key, totals in keys.items()
        )

    def _agree(self, keys: dict[str, KeyTotals], checksums: dict[str, list[str]]) -> bool:
        return self._advance(keys) and checksums == self._checksums()

    def _checksums(self) -> dict[str, list[str]]:
        return {key: [part.digest.hexdigest() for part in parts] for key, parts in self._files.items()}

    def _append(self, *lines: bytes) -> None:
        self._file.write(b"".join(line + b"\n" for line in lines))
        self._file.flush()

    @property
    def outputs(self) -> dict[str, Outputs]:
        """key → where workers write."""
        return {key: Outputs(*(part.descriptor for part in parts)) for key, parts in self._files.items()}

    @property
    def descriptor(self) -> int:
        """The file that holds the lock; workers must close it."""
        return self._file.fileno()

    def commit(self) -> None:
        """Note that the files are whole up to ``totals``."""
        whole = self._advance(self.totals.keys)
        assert whole, "a task is not in the files"
        for tokens, _ in self._files.values():
            tokens.sync_ahead()
        entry = {**asdict(self.totals), "checksums": self._checksums()}
        self._append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogateescape"))

    def finish(self, facts: dict[str, dict[str, Any]]) -> None:
        """Write indexes and side files (``facts`` by key; checksums are added); make all durable."""
        for number, (key, (tokens, lengths)) in enumerate(self._files.items()):
            os.ftruncate(tokens.descriptor, tokens.size)
            os.ftruncate(lengths.descriptor, lengths.size)
            index = self.folder / f"{number}.idx"
            array = np.memmap(lengths.path, "<i4", "r") if lengths.size else np.empty(0, "<i4")
            write_index(index, self._dtype, [array])
            checksums = {"bin": tokens.digest.hexdigest(), "idx": file_checksum(index)}
            write_facts(self.folder / f"{number}.json", {**facts[key], "xxh3_128": checksums})
            tokens.sync()
            with open(index, "rb") as file:
                os.fsync(file.fileno())
        self._append(b'"finished"')
        os.fsync(self._file.fileno())
        self.finished = True

    def publish(self) -> None:
        """Give the finished files their names and remove the folder. May be repeated after a kill."""
        for number, prefix in enumerate(self._prefixes.values()):
            # The index last: whoever sees it finds the rest.
            for name, target in (
                (f"{number}.bin", bin_path(prefix)),
                (f"{number}.json", facts_path(prefix)),
                (f"{number}.idx", idx_path(prefix)),
            ):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, target)
        fsync_directory(self.folder.parent)
        self.remove()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files, so that another run may go on."""
        self._file.close()
        for parts in self._files.values():
            for part in parts:
                part.close()
