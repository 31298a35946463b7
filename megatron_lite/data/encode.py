"""Chunks of text to arrays of tokens, in this process or in several, always in input order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.data.indexed import token_dtype
from megatron_lite.data.inputs import Chunk, texts_of
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.utils.errors import DataError

CHUNKS_AHEAD = 3
"""Chunks a worker that may wait, read or encoded, so that none is idle: memory stays bounded."""


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer by name, as :class:`TokenizerKeys` asks; cheap to send to another process."""

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None


@dataclass(frozen=True)
class EncodeSettings:
    """What becomes of each text.

    Attributes:
        tokenizer: how text becomes ids.
        keys: the JSON keys that are read; each becomes its own output.
        append_eod: whether each document ends with the end-of-document token.
        reference: whether to encode by the tokenizer's own library where there is a faster one.
    """

    tokenizer: TokenizerSource
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    reference: bool = False


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents as tokens.

    Attributes:
        documents: key → (tokens laid end to end, length of each document).
        path: ``Chunk.path``.
        position: ``Chunk.position``.
    """

    documents: dict[str, tuple[np.ndarray, np.ndarray]]
    path: Path
    position: int


class Encoder:
    """Encodes chunks with one tokenizer."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings
        self._tokenizer: Tokenizer = load_tokenizer(settings.tokenizer)
        self._dtype = token_dtype(self._tokenizer.vocab_size)

    def __call__(self, chunk: Chunk) -> Encoded:
        """The tokens of ``chunk``. Raises DataError for a bad record."""
        documents = {}
        for key, texts in texts_of(chunk, self._settings.keys).items():
            tokens, lengths = self._tokenizer.encode_arrays(texts, self._settings.reference)
            tokens = tokens.astype(self._dtype, copy=False)
            if self._settings.append_eod:
                tokens, lengths = append_to_each(tokens, lengths, self._tokenizer.eod_id)
            documents[key] = tokens, lengths
        return Encoded(documents, chunk.path, chunk.position)


def append_to_each(tokens: np.ndarray, lengths: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents laid end to end (``tokens`` [total], ``lengths`` [documents]), ``token`` after each."""
    return np.insert(tokens, np.cumsum(lengths), token), lengths + 1


def encode_chunks(chunks: Iterable[Chunk], settings: EncodeSettings, workers: int) -> Iterator[Encoded]:
    """Every chunk encoded, in order, by ``workers`` processes (1: by this one, with the library's threads).

    Raises:
        DataError: a bad record, or a worker that died.
    """
    if workers == 1:
        yield from map(Encoder(settings), chunks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(settings,)
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= workers * CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, most likely for want of memory: give fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder | DataError
"""In a worker process: its encoder, or why there is none."""


def _start_worker(settings: EncodeSettings) -> None:
    global _worker_encoder
    # One process a core already: threads of the tokenizers library on top would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _worker_encoder = Encoder(settings)
    except DataError as error:  # an initializer that raises would break the pool without telling why
        _worker_encoder = error


def _encode_in_worker(chunk: Chunk) -> Encoded:
    if isinstance(_worker_encoder, DataError):
        raise _worker_encoder
    return _worker_encoder(chunk)
