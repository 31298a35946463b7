"""Conversations to tokens, and to labels that say which of them are to be learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson

from megatron_lite.data.preprocessing.encode import Encoder, EncodeSettings
from megatron_lite.data.samples import UNCOUNTED
from megatron_lite.data.tokenizers import Tokenizer

OUTPUTS = ("text", "label")
"""Names of the outputs, unless others are asked for: the tokens; and in the same places the tokens again, or
UNCOUNTED."""


def outputs_of(key: str) -> tuple[str, str]:
    """The names of the outputs of the chats under ``key``, as GPT-NeoX's script has them."""
    return key, f"{key}_label"


class AnswerEncoder(Encoder):
    """Encodes segments (see :mod:`.conversations`), each by itself, as a model meets them: the prompt before
    there is an answer. Each document ends with the end-of-document token, which is learned if the segment
    before it is. The settings' two keys are the outputs: tokens and labels."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer) -> None:
        assert len(settings.keys) == 2, "an output for the tokens and one for the labels"
        assert settings.text.conversation is not None
        super().__init__(settings, tokenizer)
        self.read_keys = settings.keys[:1]
        self.dtype = np.dtype("<i4")  # labels are negative
        self._frame = special_tokens_around(tokenizer)
        self._keeps_first = settings.text.conversation.template is None

    def encode(self, texts: dict[str, list[str]]) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
        """key → (tokens, lengths, bytes of text) of documents, each the JSON of its segments."""
        text_key, label_key = self._settings.keys
        documents = [orjson.loads(text) for text in texts[text_key]]
        if not documents:
            nothing = np.empty(0, self.dtype), np.empty(0, "<i4"), 0
            return {text_key: nothing, label_key: nothing}
        segments = [segment for document in documents for segment in document]
        counts = np.array([len(document) for document in documents])
        firsts = np.cumsum(counts) - counts
        tokens, lengths = self._tokenizer.encode_arrays([text for text, _ in segments], self.reference)
        tokens, lengths = self._without_frame(tokens.astype(self.dtype), lengths, firsts)
        learned = np.array([flag for _, flag in segments])
        labels = np.where(np.repeat(learned, lengths), tokens, UNCOUNTED).astype(self.dtype)
        lengths = np.add.reduceat(lengths, firsts)
        tokens, labels, lengths = self._with_end(tokens, labels, lengths, last_learned(documents))
        size = sum(len(text.encode()) for text, _ in segments)
        return {text_key: (tokens, lengths, size), label_key: (labels, lengths, size)}

    def _without_frame(
        self, tokens: np.ndarray, lengths: np.ndarray, firsts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Segments without the special tokens that the tokenizer puts around every text. The one before the
        first segment of a document stays, unless a template writes it."""
        before, after = self._frame
        ends = np.cumsum(lengths)
        removed_before = np.full(len(lengths), before)
        if self._keeps_first:
            removed_before[firsts] = 0
        keep = np.ones(len(tokens), bool)
        for place in range(before):
            keep[(ends - lengths + place)[removed_before > place]] = False
        for place in range(after):
            keep[ends - 1 - place] = False
        return tokens[keep], lengths - removed_before - after

    def _with_end(
        self, tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray, learned: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents with the end-of-document token behind those that do not end with it yet."""
        eod_id, ends = self._tokenizer.eod_id, np.cumsum(lengths)
        filled = lengths > 0
        lacks = ~filled
        lacks[filled] = tokens[ends[filled] - 1] != eod_id
        tokens = np.insert(tokens, ends[lacks], eod_id)
        labels = np.insert(labels, ends[lacks], np.where(learned[lacks], eod_id, UNCOUNTED))
        return tokens, labels, (lengths + lacks).astype("<i4")


def last_learned(documents: Sequence[Sequence[tuple[str, bool]]]) -> np.ndarray:
    """Whether the last segment with text of each document is to be learned: bool [documents]."""
    return np.array([[flag for text, flag in document if text][-1] for document in documents])


def special_tokens_around(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens the tokenizer puts (before, behind) every text."""
    empty, full = tokenizer.encode(""), tokenizer.encode("a")
    before = 0
    while before < len(empty) and empty[before] == full[before]:
        before += 1
    return before, len(empty) - before
