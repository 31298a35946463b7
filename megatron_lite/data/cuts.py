"""Where fill-in-the-middle cuts a document in three: between characters, else between tokens."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from megatron_lite.data.tokenizers import Tokenizer

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Prefix, middle and suffix: int64 arrays of tokens, each of which may be empty."""

BROKEN = "\ufffd"
"""What decoding gives for bytes that are no character: a window may begin or end inside of one."""


class TokenCut:
    """Cuts between tokens."""

    def __call__(self, piece: np.ndarray, random: np.random.Generator) -> Parts | None:
        """The three parts of ``piece`` (int64 [n], n > 0)."""
        first, last = two_places(len(piece), random)
        return piece[:first], piece[first:last], piece[last:]


class TextCut:
    """Cuts between characters: decodes, cuts, and encodes each part by itself.

    A model that is asked to fill in at a place where text was cut sees what stands before that place encoded
    as if nothing followed. Cut between tokens only, it never learned from such a beginning (Bavarian et al.,
    arXiv 2207.14255, on which Megatron's and BigCode's data sets rest).

    What the text does not say in full is cut between tokens: a piece with special tokens or with half a
    character at its end, and any piece if the tokenizer does not give back a text that is encoded in parts
    (sentencepiece models that put a space before every text).

    Args:
        tokenizer: the one that made the data.
        left_alone: what texts that are not rearranged begin with; None: all are.
    """

    def __init__(self, tokenizer: Tokenizer, left_alone: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._left_alone = left_alone
        self._between_tokens = TokenCut()

    def __call__(self, piece: np.ndarray, random: np.random.Generator) -> Parts | None:
        """The three parts of ``piece`` (int64 [n], n > 0); None if it is to be left alone.

        Costs decoding the piece twice and encoding it once, about a millisecond for 1,000 tokens.
        """
        if piece.max() >= len(self._is_text):  # of a vocabulary that is larger than the tokenizer's
            return self._between_tokens(piece, random)
        text = self._tokenizer.decode(piece.tolist())
        if self._left_alone is not None and text.startswith(self._left_alone):
            return None
        if BROKEN in text or not self._is_text[piece].all():
            return self._between_tokens(piece, random)
        first, last = two_places(len(text), random)
        parts = self._ids(text[:first]), self._ids(text[first:last]), self._ids(text[last:])
        if self._tokenizer.decode(np.concatenate(parts).tolist()) != text:
            return self._between_tokens(piece, random)
        return parts

    def _ids(self, text: str) -> np.ndarray:
        """The ids of ``text`` without those that some tokenizers put around every text."""
        ids = np.array(self._tokenizer.encode(text), np.int64)
        return ids[self._is_text[ids]]

    @cached_property
    def _is_text(self) -> np.ndarray:
        """For each id whether it stands for text: bool [vocab_size]."""
        return self._tokenizer.token_bytes() > 0


def two_places(length: int, random: np.random.Generator) -> tuple[int, int]:
    """Two of the ``length + 1`` places between ``length`` things, before and after them, in order."""
    first, last = sorted(random.integers(0, length, 2, endpoint=True).tolist())
    return first, last
