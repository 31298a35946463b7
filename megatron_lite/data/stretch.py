"""A stretch of documents of a corpus, read as a stream of tokens that are checked."""

from __future__ import annotations

import numpy as np

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.permutation import CHUNK_BYTES, POOL_CHUNKS
from megatron_lite.utils.errors import DataError


class Stretch:
    """The documents ``first`` … ``last`` (exclusive) of a corpus, end to end.

    Attributes:
        documents: how many they are.
        tokens: tokens in them.
        bytes_per_token: on disk.
        tokens_per_chunk: as many as are read together (see :meth:`announce`).
    """

    def __init__(
        self, corpus: IndexedDataset, documents: tuple[int, int], vocab_size: int, split: str
    ) -> None:
        self.first, last = documents
        self.documents = last - self.first
        self._corpus = corpus
        self._vocab_size = vocab_size
        self._split = split
        self._start = corpus.token_start(self.first)
        self.tokens = corpus.token_start(last) - self._start
        self.bytes_per_token = corpus.dtype.itemsize
        self.tokens_per_chunk = CHUNK_BYTES // self.bytes_per_token
        self._announced: set[int] = set()

    def require(self, tokens: int, reason: str) -> None:
        """Raise DataError unless there are ``tokens`` tokens; ``reason`` says in words why so many."""
        if self.tokens < tokens:
            raise DataError(
                f"the {self._split} split of {self._corpus.name} has {self.documents} of "
                f"{self._corpus.document_count} documents and {self.tokens} tokens, fewer than {reason} = "
                f"{tokens}: give it more text, a larger share (split), or shorten seq_length"
            )

    def bounds(self, document: int) -> tuple[int, int]:
        """Where ``document`` (from 0) of the stretch begins and ends in its stream."""
        start = self._corpus.token_start(self.first + document)
        return start - self._start, self._corpus.token_start(self.first + document + 1) - self._start

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` … ``stop`` (exclusive) of the stream: int64.

        Raises:
            DataError: a token is not in the vocabulary.
        """
        tokens = self._corpus.tokens[self._start + start : self._start + stop].astype(np.int64)
        if len(tokens) and (tokens.max() >= self._vocab_size or tokens.min() < 0):
            wrong = tokens[(tokens >= self._vocab_size) | (tokens < 0)][0]
            raise DataError(
                f"{self._corpus.name}.bin holds the token id {wrong}, outside the vocabulary of "
                f"{self._vocab_size}: train with the tokenizer that made this file, or preprocess the text "
                "with the run's tokenizer"
            )
        return tokens

    def announce(self, token: int) -> None:
        """Say that tokens around ``token`` will be read soon: their chunk is fetched in one piece."""
        size = self.tokens_per_chunk
        chunk = token // size
        if chunk in self._announced:
            return
        if len(self._announced) > 4 * POOL_CHUNKS:
            self._announced.clear()
        self._announced.add(chunk)
        first, last = chunk * size, min((chunk + 1) * size, self.tokens)
        self._corpus.will_read(self._start + first, self._start + last)
