"""Megatron's memory-mapped token files, ``PREFIX.bin`` and ``PREFIX.idx``, byte for byte.

``PREFIX.bin`` holds the tokens and nothing else. ``PREFIX.idx`` (version 1, little-endian) holds::

    offset  0   magic b"MMIDIDX\\0\\0"
            9   uint64  version = 1
           17   uint8   dtype code of the tokens
           18   uint64  n = number of sequences
           26   uint64  m = number of document boundaries
           34   int32   lengths[n]    tokens of each sequence
                int64   offsets[n]    bytes into the .bin of each sequence
                int64   documents[m]  sequence at which each document begins; 0 first, n last
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

TOKEN_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""The integer dtypes by Megatron's code. Codes 6 and 7 are floats, which no tokens are."""

DTYPE_CODES = {dtype: code for code, dtype in TOKEN_DTYPES.items()}

LARGEST_UINT16_VOCABULARY = 65500
"""Vocabularies below this size are stored as uint16, others as int32 (Megatron's rule)."""

POINTER_CHUNK = 1 << 20
"""Sequences whose byte offsets are computed at once when an index is written (8 MB)."""


def bin_path(prefix: Path) -> Path:
    """``PREFIX.bin``."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which ids of a vocabulary of ``vocab_size`` are stored: uint16 or int32."""
    return np.dtype("<u2") if vocab_size < LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


class IndexedDataset:
    """The documents of one ``.bin/.idx`` pair, memory-mapped: opening costs the same for any corpus.

    Attributes:
        name: what the pair is called in messages.
        prefix: path of the pair without its endings.
        dtype: dtype of the tokens on disk.
        lengths: tokens of each sequence, int32 [n].
        offsets: byte offset of each sequence in the .bin, int64 [n].
        documents: sequence at which each document begins, int64 [m], from 0 to n.
        tokens: every token of the corpus as one stream, [total], ``dtype``, memory-mapped.

    Raises:
        DataError: a file is missing, of another format, truncated, or holds no token.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.name = str(prefix)
        self.prefix = Path(prefix)
        self.bin_path = bin_path(self.prefix)
        self.idx_path = idx_path(self.prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(
                    f"there is no file {path}: give the path of a .bin/.idx pair without its ending, as "
                    f"tools/preprocess_data.py writes it"
                )
        self._map()
        self.tokens: np.ndarray = np.asarray(np.memmap(self.bin_path, dtype=self.dtype, mode="r"))

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of document ``index``, a view into the file, ``dtype``.

        Raises:
            DataError: the index is damaged there.
        """
        start, end = self.token_start(index), self.token_start(index + 1)
        if end < start:
            raise self._damaged(index)
        return self.tokens[start:end]

    def token_start(self, document: int) -> int:
        """Position in ``tokens`` where ``document`` begins; for ``document_count``, where the last ends.

        Raises:
            DataError: the index is damaged there.
        """
        sequence = int(self.documents[document])
        if sequence == len(self.offsets):
            return len(self.tokens)
        start = (
            int(self.offsets[sequence]) // self.dtype.itemsize if 0 <= sequence < len(self.offsets) else -1
        )
        if not 0 <= start <= len(self.tokens):
            raise self._damaged(document)
        return start

    def bounds_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in ``tokens`` where each of ``documents`` (int64 [n], in any order) begins, and where it
        ends: int64 [n] each.

        Raises:
            DataError: the index is damaged there.
        """
        starts, ends = self._positions(documents), self._positions(documents + 1)
        damaged = np.flatnonzero((starts < 0) | (ends < starts) | (ends > len(self.tokens)))
        if len(damaged):
            raise self._damaged(int(documents[damaged[0]]))
        return starts, ends

    def _positions(self, documents: np.ndarray) -> np.ndarray:
        """:meth:`token_start` of each of ``documents``; -1 where the index names no sequence."""
        sequences = self.documents[documents]
        positions = np.full(len(sequences), len(self.tokens), np.int64)
        inside = sequences != len(self.offsets)
        known = sequences[inside]
        is_there = (known >= 0) & (known < len(self.offsets))
        offsets = self.offsets[np.where(is_there, known, 0)] // self.dtype.itemsize
        positions[inside] = np.where(is_there, offsets, -1)
        return positions

    def _damaged(self, document: int) -> DataError:
        return DataError(
            f"{self.idx_path} is damaged at document {document}: it begins where no token is, or after its "
            "end; see tools/inspect_data.py, and preprocess the text again"
        )

    def will_read(self, first: int, last: int) -> None:
        """Say that tokens ``first`` … ``last`` (exclusive) are wanted soon: the system reads them in one go,
        where single windows would each cost a seek. Does not wait."""
        if hasattr(os, "posix_fadvise"):
            descriptor = os.open(self.bin_path, os.O_RDONLY)
            size = self.dtype.itemsize
            os.posix_fadvise(descriptor, first * size, (last - first) * size, os.POSIX_FADV_WILLNEED)
            os.close(descriptor)

    def peek(self, starts: Sequence[int], count: int) -> list[bytes]:
        """The bytes of ``count`` tokens from each of ``starts`` on (fewer at the end of the corpus)."""
        return [self.tokens[start : start + count].tobytes() for start in starts]

    def _map(self) -> None:
        """Read the header, map the index, and check both files' sizes against it."""
        self.dtype, sequences, boundaries = self._read_header()
        self._map_index(sequences, boundaries)
        self._check_bin(sequences)

    def _bin_bytes(self) -> int:
        return self.bin_path.stat().st_size

    def _read_header(self) -> tuple[np.dtype, int, int]:
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{self.idx_path} is not a Megatron index (it does not begin with MMIDIDX): give the "
                "prefix of a pair that tools/preprocess_data.py or Megatron wrote"
            )
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION:
            raise DataError(
                f"{self.idx_path} has version {version} of Megatron's index format where only version "
                f"{VERSION} is known: preprocess the text again"
            )
        if code not in TOKEN_DTYPES:
            raise DataError(
                f"{self.idx_path} names the dtype code {code}, which is no integer type: preprocess the "
                "text again"
            )
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        size = self.idx_path.stat().st_size
        if size != expected:
            raise DataError(
                f"{self.idx_path} has {size} bytes where its header promises {expected}: it is truncated "
                "or of another format; copy it again or preprocess the text again"
            )
        return TOKEN_DTYPES[code], sequences, boundaries

    def _map_index(self, sequences: int, boundaries: int) -> None:
        if sequences == 0 or boundaries < 2:
            raise DataError(f"{self.idx_path} holds no documents: preprocess text that is not empty")
        buffer = np.asarray(np.memmap(self.idx_path, dtype=np.uint8, mode="r"))
        lengths_end = HEADER.size + 4 * sequences
        offsets_end = lengths_end + 8 * sequences
        self.lengths: np.ndarray = buffer[HEADER.size : lengths_end].view("<i4")
        self.offsets: np.ndarray = buffer[lengths_end:offsets_end].view("<i8")
        self.documents: np.ndarray = buffer[offsets_end:].view("<i8")
        if self.offsets[0] != 0 or self.documents[0] != 0 or self.documents[-1] != sequences:
            raise DataError(
                f"{self.idx_path} does not index documents from its first sequence to its last: it is "
                "damaged; preprocess the text again"
            )

    def _check_bin(self, sequences: int) -> None:
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        size = self._bin_bytes()
        if size != expected:
            raise DataError(
                f"{self.bin_path} has {size} bytes where {self.idx_path.name} promises {expected}: it is "
                "truncated or belongs to another index; copy both files again or preprocess the text again"
            )
        if size == 0:
            raise DataError(
                f"{self.bin_path} holds no token ({sequences} empty documents): preprocess text that is "
                "not empty"
            )


class IndexedWriter:
    """Writes a ``.bin/.idx`` pair as documents come; both files appear, whole, when the ``with`` block ends.

    Until then the tokens go to a temporary file beside the target; an error removes it and leaves the
    target as it was. Memory: four bytes a document.

    >>> with IndexedWriter(prefix, token_dtype(50257)) as writer:
    ...     writer.add([15496, 995, 50256])
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in DTYPE_CODES, f"{dtype} is not a token dtype"
        self._lengths = array("i")
        self._files = ExitStack()

    def __enter__(self) -> IndexedWriter:
        # Leaving the stack closes the files before it renames them, the .bin before the .idx: whoever sees
        # an index finds its tokens.
        self._idx_target = self._files.enter_context(atomic_path(idx_path(self.prefix)))
        self._bin_target = self._files.enter_context(atomic_path(bin_path(self.prefix)))
        self._bin: BinaryIO = self._files.enter_context(open(self._bin_target, "wb"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write_index()
                self._bin.flush()
        except BaseException as failure:
            self._files.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._files.__exit__(kind, error, trace)

    @property
    def document_count(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document (it may be empty)."""
        self.add_many(np.asarray(tokens, dtype=np.int64), np.array([len(tokens)]))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents laid end to end: ``tokens`` [sum of lengths], ``lengths`` [documents]."""
        assert int(lengths.sum()) == len(tokens), "the lengths do not add up to the tokens"
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        write_index(self._idx_target, self.dtype, [lengths])


def write_index(
    path: Path,
    dtype: np.dtype,
    lengths: Sequence[np.ndarray],
    boundaries: Sequence[np.ndarray] | None = None,
) -> None:
    """Write the ``.idx`` of tokens of ``dtype``.

    Args:
        path: the file.
        dtype: of the tokens.
        lengths: tokens of each sequence, int32 arrays of any number, end to end (one for each of several
            corpora, say).
        boundaries: for each of ``lengths``, the sequence in it at which each of its documents begins, from 0
            to its length; None: each sequence is a document.
    """
    count = sum(map(len, lengths))
    documents = count if boundaries is None else sum(len(part) - 1 for part in boundaries)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[np.dtype(dtype)], count, documents + 1))
        for part in lengths:
            file.write(part.astype("<i4", copy=False).data)
        start = 0
        for chunk in pieces(lengths):
            ends = start + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").data)
            start = int(ends[-1])
        file.write(np.zeros(1, "<i8").data)
        first = 0
        for number, part in enumerate(lengths):
            for begin in range(
                0, len(part) if boundaries is None else len(boundaries[number]) - 1, POINTER_CHUNK
            ):
                if boundaries is None:
                    chunk = np.arange(begin + 1, min(begin + POINTER_CHUNK, len(part)) + 1)
                else:
                    chunk = boundaries[number][begin + 1 : begin + 1 + POINTER_CHUNK]
                file.write((first + chunk).astype("<i8").data)
            first += len(part)


def pieces(arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """``arrays`` in order, in parts of at most :data:`POINTER_CHUNK`."""
    for whole in arrays:
        for first in range(0, len(whole), POINTER_CHUNK):
            yield whole[first : first + POINTER_CHUNK]


def numbers(count: int) -> Iterator[np.ndarray]:
    """1, 2, … ``count``, in parts of at most :data:`POINTER_CHUNK`."""
    for first in range(0, count, POINTER_CHUNK):
        yield np.arange(first + 1, min(first + POINTER_CHUNK, count) + 1)
