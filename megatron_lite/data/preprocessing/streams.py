"""Compressed files as streams of bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

import zstandard

from megatron_lite.utils.errors import DataError

COMPRESSED_BLOCK = 1 << 18
"""Bytes of a Zstandard file decompressed at once."""


class ByteStream(Protocol):
    """What is read of a file, once it is decompressed."""

    def read(self, size: int = -1, /) -> bytes:
        """About ``size`` bytes (the rest if negative), b"" at the end."""


class ZstdReader:
    """Decompressed bytes of a file of one or more Zstandard frames.

    zstandard's own stream reader takes a file that breaks off for one that ends; this one raises EOFError.
    """

    def __init__(self, file: ByteStream) -> None:
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
    ".bz2": bz2.BZ2File,
}
"""Ending → reader. A new compression is a line here."""


@contextmanager
def damage_named(place: str, ending: str) -> Iterator[None]:
    """Turn what decompressors raise about damaged data into a DataError about ``place``."""
    try:
        yield
    except (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError) as error:
        raise DataError(f"{place} is not a whole {ending} file ({error}): copy it again") from None
    except OSError as error:
        # bz2 says "Invalid data stream" by an OSError without a number; real ones have one
        if error.errno is not None:
            raise
        raise DataError(f"{place} is not a whole {ending} file ({error}): copy it again") from None
