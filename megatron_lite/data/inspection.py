"""What token files hold, and whether they are whole: what ``tools/inspect_data.py`` shows.

Everything is read once, in blocks: memory does not grow with the tokens (8 bytes a document).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing.encode import TokenizerSource
from megatron_lite.data.preprocessing.facts import facts_path, file_checksum, read_facts
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.utils.errors import DataError

SEQUENCES_AT_ONCE = 1 << 20
TOKENS_AT_ONCE = 1 << 20

BARS = "▁▂▃▄▅▆▇█"
"""Heights of a bar in a terminal, lowest first."""


@dataclass(frozen=True)
class Contents:
    """What one pass over the tokens finds.

    Attributes:
        smallest: smallest id.
        largest: largest id.
        largest_at: position of the first token with the largest id.
        checksum: XXH3 of the .bin.
    """

    smallest: int
    largest: int
    largest_at: int
    checksum: str


@dataclass(frozen=True)
class Lengths:
    """Tokens of each document: int64 [documents]."""

    tokens: np.ndarray

    @cached_property
    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents whose length doubles from bar to bar: (counts [bars], edges [bars + 1]).

        The first bar is of empty documents, if there are any, else of the shortest there are.
        """
        # frexp's exponent is the number of bits: 0 → 0, 1 → 1, 2 and 3 → 2, 4 to 7 → 3 …
        bits = np.frexp(self.tokens)[1]
        first, last = int(bits.min()), int(bits.max())
        counts = np.bincount(bits - first, minlength=last - first + 1)
        edges = np.array([0 if bit == 0 else 1 << (bit - 1) for bit in range(first, last + 2)], np.int64)
        return counts, edges

    @property
    def bars(self) -> str:
        """The histogram in a line of text; a bar of any document is at least the lowest."""
        counts, _ = self.histogram
        heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
        return "".join(
            BARS[height] if count else " " for height, count in zip(heights.tolist(), counts, strict=True)
        )


def chunks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``size`` from ``first`` to ``last``."""
    for start in range(first, last, size):
        yield start, min(start + size, last)


def check_index(corpus: IndexedDataset) -> None:
    """Raise DataError when a length, an offset or a document of ``corpus`` contradicts the others."""
    end = 0
    for first, last in chunks(0, len(corpus.lengths), SEQUENCES_AT_ONCE):
        lengths = corpus.lengths[first:last].astype(np.int64)
        ends = end + np.cumsum(lengths) * corpus.dtype.itemsize
        starts = np.concatenate([[end], ends[:-1]])
        wrong = np.flatnonzero((lengths < 0) | (corpus.offsets[first:last] != starts))
        if len(wrong):
            number = first + int(wrong[0])
            raise DataError(
                f"{corpus.idx_path} is damaged at sequence {number}: length {corpus.lengths[number]}, offset "
                f"{corpus.offsets[number]} where {starts[wrong[0]]} is due; copy it again or preprocess the "
                "text again"
            )
        end = int(ends[-1])
    for first, last in chunks(0, len(corpus.documents) - 1, SEQUENCES_AT_ONCE):
        falling = np.flatnonzero(np.diff(corpus.documents[first : last + 1]) < 0)
        if len(falling):
            raise DataError(
                f"{corpus.idx_path} is damaged at document {first + int(falling[0])}, which ends before it "
                "begins; copy it again or preprocess the text again"
            )


def read_contents(corpus: IndexedDataset) -> Contents:
    """One pass over the tokens."""
    digest = xxhash.xxh3_128()
    smallest, largest, largest_at = np.iinfo(np.int64).max, np.iinfo(np.int64).min, 0
    with open(corpus.bin_path, "rb") as file:
        position = 0
        while block := file.read(TOKENS_AT_ONCE * corpus.dtype.itemsize):
            digest.update(block)
            ids = np.frombuffer(block, corpus.dtype)
            smallest = min(smallest, int(ids.min()))
            if int(ids.max()) > largest:
                largest, largest_at = int(ids.max()), position + int(ids.argmax())
            position += len(ids)
    return Contents(smallest, largest, largest_at, digest.hexdigest())


def check_contents(corpus: IndexedDataset, contents: Contents) -> bool:
    """Compare with the side file; False if there is none, or none with checksums.

    Raises:
        DataError: the files are not those that it was written for.
    """
    expected = (read_facts(corpus.prefix) or {}).get("xxh3_128")
    if expected is None:
        return False
    found = {corpus.bin_path: contents.checksum, corpus.idx_path: file_checksum(corpus.idx_path)}
    for path, checksum in found.items():
        if expected.get(path.suffix[1:]) != checksum:
            raise DataError(
                f"{path} is not what {facts_path(corpus.prefix).name} says (its checksum differs): it was "
                "changed or damaged; copy both again or preprocess the text again"
            )
    return True


def check_ids(corpus: IndexedDataset, contents: Contents, vocab_size: int) -> None:
    """Raise DataError when an id is none of a vocabulary of ``vocab_size``."""
    if contents.smallest >= 0 and contents.largest < vocab_size:
        return
    where = document_at(corpus, contents.largest_at) if contents.largest >= vocab_size else None
    place = f" (the largest is in document {where})" if where is not None else ""
    raise DataError(
        f"{corpus.bin_path} has ids from {contents.smallest} to {contents.largest}{place} where the "
        f"vocabulary has 0 to {vocab_size - 1}: another tokenizer encoded it; preprocess the text again, or "
        "train with that one"
    )


def token_starts(corpus: IndexedDataset) -> np.ndarray:
    """Position of each document's first token, and last the number of tokens: int64 [documents + 1]."""
    starts = np.full(corpus.document_count + 1, len(corpus.tokens), np.int64)
    sequences = corpus.documents
    inside = int(np.searchsorted(sequences, len(corpus.offsets)))  # later ones are empty, at the end
    starts[:inside] = corpus.offsets[sequences[:inside]] // corpus.dtype.itemsize
    return starts


def document_lengths(corpus: IndexedDataset) -> Lengths:
    """Tokens of each document."""
    return Lengths(np.diff(token_starts(corpus)))


def document_at(corpus: IndexedDataset, position: int) -> int:
    """The document that holds token ``position``."""
    return int(np.searchsorted(token_starts(corpus), position, side="right")) - 1


def ended_documents(corpus: IndexedDataset, eod_id: int) -> int:
    """Documents whose last token is ``eod_id``."""
    starts = token_starts(corpus)
    ends = starts[1:][np.diff(starts) > 0] - 1
    return sum(
        int((corpus.tokens[ends[first:last]] == eod_id).sum())
        for first, last in chunks(0, len(ends), SEQUENCES_AT_ONCE)
    )


def recorded_tokenizer(prefix: Path) -> Tokenizer | None:
    """The tokenizer that the side file of ``prefix`` names; None if it names none whose files are there.

    Raises:
        DataError: the files are there and give other ids than when the text was encoded.
    """
    recorded = (read_facts(prefix) or {}).get("tokenizer")
    if recorded is None:
        return None
    source = TokenizerSource(
        recorded["tokenizer_type"], recorded.get("vocab_file"), recorded.get("merge_file")
    )
    if not all(Path(file).exists() for file in (source.vocab_file, source.merge_file) if file):
        return None
    tokenizer = load_tokenizer(source)
    if tokenizer.fingerprint != recorded["fingerprint"]:
        raise DataError(
            f"{source.vocab_file} is no longer the vocabulary that {prefix} was encoded with: give the right "
            "one with --tokenizer-type and --vocab-file, or preprocess the text again"
        )
    return tokenizer
