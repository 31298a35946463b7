"""gigatoken: byte-level BPE many times faster than the tokenizers library, used where the ids are equal."""

from __future__ import annotations

from collections.abc import Sequence

import gigatoken
import numpy as np
import tokenizers

from megatron_lite.data.tokenizers.base import with_token_after_each
from megatron_lite.data.tokenizers.export import PROBES
from megatron_lite.utils.errors import DataError

SAMPLE_CHARACTERS = 1024
"""Of every batch, a document (so much of it) is encoded by the tokenizers library too, and compared."""


class FastEncoder:
    """The ids of ``library`` by gigatoken, compared with the library's own on a sample of each batch.

    Documents are encoded in one call, each followed by the end-of-document token, which no other token
    reaches across: they end where its id is. gigatoken's own call for many texts gives the same, but as an
    awkward array, and importing that library takes longer than the rest of the start.

    Args:
        library: the reference.
        fast: gigatoken's tokenizer for it.
        eod_token: the end-of-document token.
        joined: whether it may be used so, see :func:`joins`; else documents are encoded one by one.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, fast: gigatoken.Tokenizer, eod_token: str, joined: bool
    ) -> None:
        self._library = library
        self._fast = fast
        self._eod = eod_token.encode()
        eod_id = library.token_to_id(eod_token)
        assert eod_id is not None, f"the vocabulary has no {eod_token}"
        self._eod_id = eod_id
        self.joined = joined

    def encode_arrays(self, texts: Sequence[str], ended: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Tokenizer.encode_arrays`.

        Raises:
            DataError: the two libraries give different ids for the sample.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        pieces = [text.encode() for text in texts]
        tokens, lengths = self._in_one_call(pieces) or self._one_by_one(pieces)
        self._compare(texts, tokens, lengths)
        return (tokens, lengths) if ended else without_last_of_each(tokens, lengths)

    # Both give the documents with the end-of-document token after each.

    def _in_one_call(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
        """None if that cannot be, for example because a document has the end-of-document token in it."""
        if not self.joined:
            return None
        tokens = self._fast.encode(self._eod.join([*pieces, b""]))
        ends = np.flatnonzero(tokens == self._eod_id)
        return (tokens, np.diff(ends, prepend=-1)) if len(ends) == len(pieces) else None

    def _one_by_one(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._fast.encode(piece) for piece in pieces]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return with_token_after_each(np.concatenate(parts), lengths, self._eod_id)

    def _compare(self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        # A document that differs from batch to batch, without a generator whose state would be kept.
        index = len(tokens) % len(texts)
        text = texts[index]
        if len(text) <= SAMPLE_CHARACTERS:
            end = int(lengths[: index + 1].sum())
            ids = tokens[end - int(lengths[index]) : end - 1].tolist()
        else:
            text = text[:SAMPLE_CHARACTERS]
            ids = self._fast.encode(text).tolist()
        if ids != self._library.encode(text).ids:
            raise DataError(
                f"gigatoken and the tokenizers library give different ids for text that begins with "
                f"{text[:40]!r}: preprocess with --encoder reference, and report the text to gigatoken"
            )


def without_last_of_each(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents laid end to end, their last tokens left out."""
    return np.delete(tokens, np.cumsum(lengths) - 1), lengths - 1


def fast_encoder(library: tokenizers.Tokenizer, definition: str, eod_token: str) -> FastEncoder | None:
    """A fast encoder for ``library``; None if gigatoken does not know its kind or gives other ids.

    Args:
        library: the reference.
        definition: its tokenizer.json.
        eod_token: its end-of-document token.
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
    return FastEncoder(library, fast, eod_token, joins(library, fast, eod_token, probes, ids))


def joins(
    library: tokenizers.Tokenizer,
    fast: gigatoken.Tokenizer,
    token: str,
    probes: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> bool:
    """Whether ``token`` between texts leaves the ids of each as they are alone: ``ids`` of ``probes``."""
    expected = [index for document in ids for index in (*document, library.token_to_id(token))]
    return fast.encode("".join(probe + token for probe in probes)).tolist() == expected
