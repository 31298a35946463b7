"""What identifies the token files of a data set, in few reads whatever their size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing.facts import facts_path

PLACES = 32
"""Places, spread evenly over the tokens, and over the documents, that are hashed."""

TOKENS_A_PLACE = 256

LARGEST_SIDE_FILE = 16 << 20
"""Bytes; what is larger beside the token files is something else, such as the text they were made of."""


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a data set's files.

    Attributes:
        path: their prefix, for messages only: files may be moved.
        tokens: how many.
        documents: how many.
        sampled: XXH3 of the tokens and document lengths at :data:`PLACES` places.
        checksums: of the whole files by the side file of tools/preprocess_data.py; None if there is none.
    """

    path: str
    tokens: int
    documents: int
    sampled: str
    checksums: dict[str, str] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``Fingerprint(**fields)`` reads it again."""
        return asdict(self)

    def difference(self, other: Fingerprint) -> str | None:
        """In words, how the files differ from those of ``other``, which were there before; None if equal."""
        for what in ("tokens", "documents"):
            now, before = getattr(self, what), getattr(other, what)
            if now != before:
                return f"{now:,} {what} where there were {before:,}"
        known = self.checksums and other.checksums
        if self.sampled != other.sampled or (known and self.checksums != other.checksums):
            return "the same size and other content"
        return None


def fingerprint(corpus: IndexedDataset) -> Fingerprint:
    """The fingerprint of an opened data set: some hundred kilobytes are read."""
    digest = xxhash.xxh3_128(corpus.dtype.str.encode())
    total = len(corpus.tokens)
    starts = np.linspace(0, max(0, total - TOKENS_A_PLACE), PLACES).astype(np.int64).tolist()
    for part in corpus.peek(starts, TOKENS_A_PLACE):
        digest.update(part)
    for document in np.linspace(0, corpus.document_count, PLACES).astype(np.int64).tolist():
        digest.update(corpus.token_start(document).to_bytes(8, "little"))
    return Fingerprint(
        corpus.name, total, corpus.document_count, digest.hexdigest(), _checksums(corpus.prefix)
    )


def _checksums(prefix: Path) -> dict[str, str] | None:
    """What the side file of tools/preprocess_data.py says; None if what is there, if anything, is none."""
    path = facts_path(prefix)
    try:
        if path.stat().st_size > LARGEST_SIDE_FILE:
            return None
        checksums = json.loads(path.read_bytes())["xxh3_128"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return checksums if isinstance(checksums, dict) else None
