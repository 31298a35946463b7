"""Texts to arrays of tokens as they go to disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_lite.data.indexed import token_dtype
from megatron_lite.data.preprocessing.records import Bad, read_records
from megatron_lite.data.preprocessing.sources import Task
from megatron_lite.data.preprocessing.transforms import TextSettings
from megatron_lite.data.tokenizers import Tokenizer
from megatron_lite.data.tokenizers.base import with_token_after_each
from megatron_lite.utils.errors import DataError

BAD_SHOWN = 20
"""Bad records of a task that are described; the rest is only counted."""


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer by name, as :class:`TokenizerKeys` asks."""

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None


@dataclass(frozen=True)
class EncodeSettings:
    """What becomes of each record.

    Attributes:
        tokenizer: how text becomes ids.
        keys: the JSON keys that are read (nested ones by dots); each becomes its own output.
        append_eod: whether each document ends with the end-of-document token.
        prepend: special tokens (or ids) that begin each document.
        append: special tokens (or ids) that end each document, before the end-of-document token.
        max_tokens: documents that are longer become several of at most so many tokens; None: left whole.
        separator: what divides a text file into documents; None: the file is one.
        reference: whether to encode by the tokenizer's own library where there is a faster one.
        text: steps between a record and its text.
    """

    tokenizer: TokenizerSource
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend: tuple[str, ...] = ()
    append: tuple[str, ...] = ()
    max_tokens: int | None = None
    separator: str | None = None
    reference: bool = False
    text: TextSettings = field(default_factory=TextSettings)


@dataclass
class Encoded:
    """A task's documents as tokens, with what is counted.

    Attributes:
        tokens: key → the documents' tokens laid end to end, in the dtype of the file.
        lengths: key → tokens of each document, int32.
        records: records that became documents.
        lines: lines (records, rows) read.
        text_bytes: key → UTF-8 bytes of the texts.
        bad: broken records, the first :data:`BAD_SHOWN` of them.
        bad_count: all of them.
        dropped: records that a setting left out.
    """

    tokens: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    records: int = 0
    lines: int = 0
    text_bytes: dict[str, int] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    bad_count: int = 0
    dropped: int = 0


class Encoder:
    """Encodes tasks with one tokenizer.

    Raises:
        DataError: a token in ``prepend`` or ``append`` is none of the vocabulary.
    """

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._before = [token_id(tokenizer, token) for token in settings.prepend]
        self._after = [token_id(tokenizer, token) for token in settings.append]
        self._ended = settings.append_eod and not self._after
        if settings.append_eod and self._after:
            self._after.append(tokenizer.eod_id)

    def __call__(self, task: Task) -> Encoded:
        """The tokens of ``task``. Raises DataError when a file is damaged."""
        keys = self._settings.keys
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {key: [] for key in keys}
        encoded = Encoded({}, {}, text_bytes=dict.fromkeys(keys, 0))
        for records in read_records(task, keys, self._settings.text):
            for bad in records.bad[: BAD_SHOWN - len(encoded.bad)]:
                encoded.bad.append(shifted(bad, encoded.lines))
            encoded.bad_count += len(records.bad)
            encoded.dropped += records.dropped
            encoded.lines += records.lines
            encoded.records += len(records.texts[keys[0]])
            for key, texts in records.texts.items():
                encoded.text_bytes[key] += utf8_bytes(texts)
                parts[key].append(self._arrays(texts))
        for key in keys:
            encoded.tokens[key] = joined([tokens for tokens, _ in parts[key]], self.dtype)
            encoded.lengths[key] = joined([lengths for _, lengths in parts[key]], np.dtype("<i4"))
        return encoded

    def _arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = self._tokenizer.encode_arrays(texts, self._settings.reference, self._ended)
        tokens, lengths = surround(tokens.astype(self.dtype, copy=False), lengths, self._before, self._after)
        if self._settings.max_tokens is not None:
            lengths = split_lengths(lengths, self._settings.max_tokens)
        return tokens, lengths.astype("<i4")


def shifted(bad: Bad, lines: int) -> Bad:
    """``bad``, its line counted from ``lines`` lines earlier."""
    return bad if bad.line is None else Bad(bad.line + lines, bad.word, bad.place, bad.reason)


def joined(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """``parts`` as one array of ``dtype``, not copied if there is one."""
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0], dtype=dtype)
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


def utf8_bytes(texts: Sequence[str]) -> int:
    """Bytes of ``texts`` in UTF-8."""
    return sum([len(text) if text.isascii() else len(text.encode()) for text in texts])


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of ``token``: a number, or text that the tokenizer makes one token of.

    Raises:
        DataError: it is neither.
    """
    if token.isdigit() and int(token) < tokenizer.vocab_size:
        return int(token)
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise DataError(
            f"{token!r} is not one token but {len(ids)}: give a special token of the vocabulary or an id"
        )
    return ids[0]


def surround(
    tokens: np.ndarray, lengths: np.ndarray, before: Sequence[int] = (), after: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Documents laid end to end (``tokens`` [total], ``lengths`` [documents]) with the tokens ``before`` and
    ``after`` around each."""
    for token in after:
        tokens, lengths = with_token_after_each(tokens, lengths, token)
    for token in reversed(before):
        tokens, lengths = np.insert(tokens, np.cumsum(lengths) - lengths, token), lengths + 1
    return tokens, lengths


def split_lengths(lengths: np.ndarray, most: int) -> np.ndarray:
    """Lengths of the documents when those longer than ``most`` are cut; the tokens stay where they are."""
    pieces = np.maximum(1, -(-lengths // most))
    result = np.full(int(pieces.sum()), most, dtype=lengths.dtype)
    result[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * most
    return result
