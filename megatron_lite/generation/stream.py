"""Token ids to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""


class TextStream:
    """Turns the tokens of one sequence into text as they come; a character is never split.

    A byte-level token may end inside a UTF-8 character; its text is held back until the rest has come. Each
    piece is decoded after the piece before it, because some tokenizers write a token differently at the start
    of a text (sentencepiece drops its space). A step decodes a few tokens, not the whole text.

    Args:
        tokenizer: decodes.
        before: the tokens that the sequence continues.
    """

    def __init__(self, tokenizer: Decoder, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(before)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._pending.append(token)
        text = self._pending_text()
        if text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What was held back, with a replacement character for the part that never came."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]
