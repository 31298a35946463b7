"""Token files in object storage: ``s3://``, ``gs://``, ``http://`` and what else fsspec knows.

``PREFIX.idx`` is copied whole to ``data_cache_dir``. Of ``PREFIX.bin`` only the blocks that are read are
fetched; they are kept there as files, up to ``data_cache_gigabytes``, the oldest being deleted first. The
ranks of a machine share them.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
import numpy as np

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path, locked

BLOCK_BYTES = 1 << 20
"""What is fetched at once: that of a chunk of the shuffle."""

ATTEMPTS = 4
"""How often a request is made before its failure ends the run; the pauses between are 1, 2 and 4 s."""

FETCHERS = 4
"""Threads that fetch ahead of need: a chunk each."""

VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "mtime", "created"),
)
"""What the file systems call that which changes with a file's content."""

R = TypeVar("R")


def is_remote(prefix: str) -> bool:
    """Whether ``prefix`` is a URL and no path."""
    return "://" in prefix


class RemoteDataset(IndexedDataset):
    """A ``.bin/.idx`` pair under a URL; see :class:`IndexedDataset`.

    Args:
        url: of the pair, without its endings.
        cache: the folder where parts of it are kept.
        cache_bytes: how much of all the remote ``.bin`` files is kept there.

    Raises:
        DataError: the file system is not installed, a file is missing or cannot be read, or is damaged.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        self.name = url
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise DataError(f"{url} cannot be opened: {error}") from error
        self._idx_info = _patiently(f"{url}.idx", lambda: files.info(f"{path}.idx"))
        self._bin_info = _patiently(f"{url}.bin", lambda: files.info(f"{path}.bin"))
        if self._bin_info.get("size") is None:
            raise DataError(f"{url}.bin does not tell its size: its server cannot give parts of files")
        if not _patiently(f"{url}.bin", lambda: _gives_parts(files, f"{path}.bin", self._bin_bytes())):
            raise DataError(
                f"the server of {url}.bin does not give parts of files (HTTP range requests): serve it by "
                "one that does, or copy the files"
            )
        folder = cache / _identity(url, self._idx_info, self._bin_info)
        folder.mkdir(parents=True, exist_ok=True)
        self.prefix = folder / "tokens"
        self.bin_path, self.idx_path = folder / "tokens.bin", folder / "tokens.idx"
        with locked(folder / ".lock"):
            if not self.idx_path.exists():
                with atomic_path(self.idx_path) as temporary:
                    _patiently(f"{url}.idx", lambda: files.get_file(f"{path}.idx", str(temporary)))
        try:
            self._map()
        except DataError as error:
            raise DataError(f"{url}: {error}") from error
        self._file = RemoteFile(files, f"{path}.bin", f"{url}.bin", self._bin_bytes())
        self._blocks = blocks = BlockCache(self._file, folder / "blocks", cache, cache_bytes)
        self._ahead = FetchAhead(blocks)
        # Sliced like the array that it stands for; nothing else is done with it here.
        self.tokens = cast(np.ndarray, RemoteTokens(blocks, self.dtype))

    def will_read(self, first: int, last: int) -> None:
        """Begin to fetch what is missing of tokens ``first`` … ``last`` (exclusive). Does not wait."""
        size = self.dtype.itemsize
        self._ahead.fetch(self._blocks.numbers(first * size, last * size))

    def peek(self, starts: Sequence[int], count: int) -> list[bytes]:
        """See :meth:`IndexedDataset.peek`; nothing more than these bytes is fetched, and nothing kept."""
        size = self.dtype.itemsize
        return self._file.ranges([start * size for start in starts], count * size)

    def _bin_bytes(self) -> int:
        return int(self._bin_info["size"])


class RemoteTokens:
    """The tokens of a remote ``.bin`` as a sequence: slices are arrays of ``dtype``."""

    def __init__(self, blocks: BlockCache, dtype: np.dtype) -> None:
        self._blocks = blocks
        self._dtype = dtype

    def __len__(self) -> int:
        return self._blocks.size // self._dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1, "tokens are read in order"
        size = self._dtype.itemsize
        return np.frombuffer(self._blocks.read(start * size, stop * size), self._dtype)


@dataclass(frozen=True)
class RemoteFile:
    """A file of ``size`` bytes at ``path`` of ``files``, fsspec's file system; messages call it ``url``."""

    files: Any
    path: str
    url: str
    size: int

    def ranges(self, starts: Sequence[int], count: int) -> list[bytes]:
        """``count`` bytes from each of ``starts`` on, or what there is of them, by requests at the same time.

        Raises:
            DataError: they cannot be read.
        """
        stops = [min(start + count, self.size) for start in starts]
        parts = _patiently(
            self.url,
            lambda: self.files.cat_ranges([self.path] * len(starts), list(starts), stops, on_error="raise"),
        )
        if [len(part) for part in parts] != [stop - start for start, stop in zip(starts, stops, strict=True)]:
            raise DataError(
                f"{self.url} gives other bytes than were asked for: it has changed, or its server "
                "cannot give parts of files"
            )
        return parts


class BlockCache:
    """Blocks of one remote file, each a local file."""

    def __init__(self, file: RemoteFile, folder: Path, shared_folder: Path, limit: int) -> None:
        """``folder`` is for this file's blocks; all blocks below ``shared_folder`` together stay below
        ``limit`` bytes, or a little more when ranks fetch at once."""
        self.size = file.size
        self._remote = file
        self._folder = folder
        self._shared = shared_folder
        self._limit = limit
        self._fetched_since = limit  # look at what there is before the first block is added
        self._coming: set[int] = set()  # blocks that some thread of this process is fetching
        self._changed = threading.Condition()
        folder.mkdir(exist_ok=True)

    def numbers(self, start: int, stop: int) -> range:
        """The blocks that hold bytes ``start`` … ``stop`` (exclusive)."""
        return range(start // BLOCK_BYTES, -(-min(stop, self.size) // BLOCK_BYTES))

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` … ``stop`` (exclusive). Raises DataError when they cannot be fetched."""
        parts = []
        for number in self.numbers(start, stop):
            first = number * BLOCK_BYTES
            parts.append(self._block(number, max(start - first, 0), min(stop - first, BLOCK_BYTES)))
        return b"".join(parts)

    def fetch(self, numbers: Iterable[int]) -> None:
        """Bring those of the blocks that are not here. Raises DataError when one cannot be fetched.

        Those that another thread is fetching are waited for; if it fails they are still missing.
        """
        wanted = set(numbers)
        with self._changed:
            mine = sorted(n for n in wanted - self._coming if not self._file(n).exists())
            self._coming.update(mine)
        try:
            if mine:
                self._fetch(mine)
        finally:
            with self._changed:
                self._coming.difference_update(mine)
                self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: not wanted & self._coming)

    def _fetch(self, numbers: Sequence[int]) -> None:
        blocks = self._remote.ranges([number * BLOCK_BYTES for number in numbers], BLOCK_BYTES)
        self._make_room(sum(map(len, blocks)))
        for number, block in zip(numbers, blocks, strict=True):
            temporary = self._folder / f".{number}.{os.getpid()}.{threading.get_ident()}.tmp"
            temporary.write_bytes(block)
            with suppress(FileNotFoundError):  # deleted for want of room: it will be fetched again
                os.replace(temporary, self._file(number))

    def _block(self, number: int, start: int, stop: int) -> bytes:
        """Bytes of a block. Another rank may delete it at any moment."""
        while True:
            try:
                with open(self._file(number), "rb") as file:
                    part = os.pread(file.fileno(), stop - start, start)
            except FileNotFoundError:
                self.fetch([number])
                continue
            if len(part) == stop - start:
                return part
            # A power cut may leave a file without its content.
            self._file(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _make_room(self, size: int) -> None:
        """Delete the oldest blocks when the limit is near; looked at each time 1/16 of it has been added.

        Those that killed runs left half written are counted and deleted as well.
        """
        self._fetched_since += size
        if self._fetched_since * 16 < self._limit:
            return
        entries = sorted((*_times(file), file) for file in self._shared.glob("*/blocks/*"))
        surplus = sum(size for _, size, _ in entries) + size - self._limit * 15 // 16
        for _, bytes_there, file in entries:
            if surplus <= 0:
                break
            file.unlink(missing_ok=True)
            surplus -= bytes_there
        self._fetched_since = 0


class FetchAhead:
    """Threads that fetch blocks which will be read. What they cannot fetch fails when it is read."""

    def __init__(self, blocks: BlockCache) -> None:
        self._blocks = blocks
        self._wanted: queue.SimpleQueue[range] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def fetch(self, numbers: range) -> None:
        """Put the blocks ``numbers`` at the end of the queue."""
        self._wanted.put(numbers)
        if len(self._threads) < FETCHERS:
            # Daemons: the end of a run does not wait for what it will not read.
            thread = threading.Thread(target=self._work, daemon=True, name="fetch-ahead")
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            numbers = self._wanted.get()
            with suppress(DataError, OSError):
                self._blocks.fetch(numbers)


def _times(file: Path) -> tuple[int, int]:
    """(time of writing, size) of a block; it may just have been deleted."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _identity(url: str, *infos: dict[str, Any]) -> str:
    """A name for the present version of the files under ``url``."""
    facts = [[info["size"], *(str(info[key]) for key in VERSION_FIELDS if key in info)] for info in infos]
    return hashlib.blake2b(repr([url, facts]).encode(), digest_size=12).hexdigest()


def _gives_parts(files: Any, path: str, size: int) -> bool:
    """Whether the last byte of ``path`` can be read by itself.

    A server that cannot do so would send the whole file for every block. (fsspec's http finds out by the
    headers of the answer, and raises ValueError.)
    """
    if not size:
        return True
    with files.open(path, "rb", size=size, cache_type="none") as file:
        try:
            file.seek(size - 1)
            return len(file.read(1)) == 1
        except ValueError:
            return False


def _is_missing(error: FileNotFoundError) -> bool:
    """Whether the file is missing indeed: fsspec's http says so of every failure, whose cause tells more."""
    cause = error.__cause__
    return cause is None or getattr(cause, "status", None) in (404, 410)


def _patiently(what: str, request: Callable[[], R]) -> R:
    """The result of ``request``, made again after a failure: networks have their moments."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except Exception as error:  # each file system has its own kinds
            reason: BaseException = error
            if isinstance(error, FileNotFoundError):
                if _is_missing(error):
                    raise DataError(f"there is no file {what}: give the URL of a .bin/.idx pair") from error
                reason = error.__cause__ or error
            if attempt == ATTEMPTS - 1:
                raise DataError(f"{what} cannot be read: {str(reason) or type(reason).__name__}") from error
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")
