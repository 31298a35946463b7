"""gigatoken: byte-level BPE many times faster than the tokenizers library, used where the ids are equal."""

from __future__ import annotations

from collections.abc import Sequence

import gigatoken
import numpy as np
import tokenizers

from megatron_lite.data.tokenizers.export import PROBES
from megatron_lite.utils.errors import DataError

SAMPLE_CHARACTERS = 1024
"""Of every batch, a document (so much of it) is encoded by the tokenizers library too, and compared."""


class FastEncoder:
    """The ids of ``library`` by gigatoken, compared with the library's own on a sample of each batch.

    Documents are encoded in one call, joined by a special token, which no other token reaches across: their
    ends are where its id is. gigatoken's own call for many texts gives the same, but as an awkward array, and
    importing that library takes longer than the rest of the start.

    Args:
        library: the reference.
        fast: gigatoken's tokenizer for it.
        separator: a special token that :func:`joins` has found fit; None: documents are encoded one by one.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, fast: gigatoken.Tokenizer, separator: str | None
    ) -> None:
        self._library = library
        self._fast = fast
        self._separator = separator.encode() if separator else None
        self._separator_id = library.token_to_id(separator) if separator else None

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Tokenizer.encode_arrays`.

        Raises:
            DataError: the two libraries give different ids for the sample.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        pieces = [text.encode() for text in texts]
        tokens, lengths = self._joined(pieces) or self._one_by_one(pieces)
        self._compare(texts, tokens, lengths)
        return tokens, lengths

    def _joined(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
        """By one call; None if a document has the separator in it."""
        if self._separator is None:
            return None
        tokens = self._fast.encode(self._separator.join(pieces))
        kept = tokens != self._separator_id
        ends = np.flatnonzero(~kept)
        if len(ends) != len(pieces) - 1:
            return None
        lengths = np.diff(ends, prepend=-1, append=len(tokens)) - 1
        return tokens[kept], lengths

    def _one_by_one(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._fast.encode(piece) for piece in pieces]
        return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts))

    def _compare(self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        # A document that differs from batch to batch, without a generator whose state would be kept.
        index = len(tokens) % len(texts)
        text = texts[index]
        if len(text) <= SAMPLE_CHARACTERS:
            end = int(lengths[: index + 1].sum())
            ids = tokens[end - int(lengths[index]) : end].tolist()
        else:
            text = text[:SAMPLE_CHARACTERS]
            ids = self._fast.encode(text).tolist()
        if ids != self._library.encode(text).ids:
            raise DataError(
                f"gigatoken and the tokenizers library give different ids for text that begins with "
                f"{text[:40]!r}: preprocess with --encoder reference, and report the text to gigatoken"
            )


def fast_encoder(library: tokenizers.Tokenizer, definition: str, separator: str) -> FastEncoder | None:
    """A fast encoder for ``library``; None if gigatoken does not know its kind or gives other ids.

    Args:
        library: the reference.
        definition: its tokenizer.json.
        separator: a special token of it.
    """
    try:
        fast = gigatoken.Tokenizer.from_json(definition)
    except Exception:  # whatever gigatoken raises, the tokenizers library can do it
        return None
    added = "".join(token.content + " x" for token in library.get_added_tokens_decoder().values())
    probes = [*PROBES, added, ""]
    ids = [library.encode(probe).ids for probe in probes]
    if [fast.encode(probe).tolist() for probe in probes] != ids:
        return None
    return FastEncoder(library, fast, separator if joins(library, fast, separator, probes, ids) else None)


def joins(
    library: tokenizers.Tokenizer,
    fast: gigatoken.Tokenizer,
    separator: str,
    probes: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> bool:
    """Whether ``separator`` between texts leaves the ids of each as they are alone: ``ids`` of ``probes``."""
    expected = [index for document in ids for index in (*document, library.token_to_id(separator))]
    return fast.encode(separator.join(probes)).tolist() == expected[:-1]
