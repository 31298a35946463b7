"""A stretch of documents of a corpus, read as a stream of tokens that are checked."""

from __future__ import annotations

import numpy as np

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.permutation import CHUNK_BYTES, POOL_CHUNKS
from megatron_lite.data.samples import Sample, Window
from megatron_lite.utils.errors import DataError


class Stretch:
    """The documents ``first`` … ``last`` (exclusive) of a corpus, end to end.

    ``labels`` are those of GPT-NeoX: another corpus of as many documents of the same lengths, with the token
    itself in each place that is to be predicted, and a negative number in the others.

    Attributes:
        name: what an error calls them: the split and the corpus.
        documents: how many they are.
        tokens: tokens in them.
        bytes_per_token: on disk.
        tokens_per_chunk: as many as are read together (see :meth:`announce`).
    """

    def __init__(
        self,
        corpus: IndexedDataset,
        documents: tuple[int, int],
        vocab_size: int,
        split: str,
        labels: IndexedDataset | None = None,
    ) -> None:
        self.first, last = documents
        self.documents = last - self.first
        self._corpus = corpus
        self._labels = labels
        self._vocab_size = vocab_size
        self.name = f"the {split} split of {corpus.name}"
        self._start = corpus.token_start(self.first)
        self.tokens = corpus.token_start(last) - self._start
        self.bytes_per_token = corpus.dtype.itemsize
        self.tokens_per_chunk = CHUNK_BYTES // self.bytes_per_token
        self._announced: set[int] = set()

    def require(self, tokens: int, reason: str) -> None:
        """Raise DataError unless there are ``tokens`` tokens; ``reason`` says in words why so many."""
        if self.tokens < tokens:
            raise DataError(
                f"{self.name} has {self.documents} of {self._corpus.document_count} documents and "
                f"{self.tokens} tokens, fewer than {reason} = {tokens}: give it more text, a larger share "
                "(split), or shorten seq_length"
            )

    def per_chunk(self, count: int) -> int:
        """How many of ``count`` pieces, into which the stream falls, are read together: one at least."""
        return max(1, self.tokens_per_chunk * count // self.tokens)

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
            raise self._stranger(self._corpus, tokens[(tokens >= self._vocab_size) | (tokens < 0)][0])
        return tokens

    def read_labels(self, start: int, stop: int) -> np.ndarray:
        """What is to be predicted in the places ``start`` … ``stop`` (exclusive) of the stream: int64.

        Negative where nothing is; without labels, the tokens.

        Raises:
            DataError: a label is not in the vocabulary.
        """
        if self._labels is None:
            return self.read(start, stop)
        labels = self._labels.tokens[self._start + start : self._start + stop].astype(np.int64)
        if len(labels) and labels.max() >= self._vocab_size:
            raise self._stranger(self._labels, labels.max())
        return labels

    def sample(self, start: int, stop: int) -> Window | Sample:
        """The sample of tokens ``start`` … ``stop`` (exclusive), of which the last is only predicted.

        Raises:
            DataError: a token or label is not in the vocabulary.
        """
        if self._labels is None:
            return self.read(start, stop)
        return Sample(self.read(start, stop - 1), self.read_labels(start + 1, stop))

    def bounds_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of ``documents`` (int64 [n], from 0, in any order) begins and ends in the stream: int64
        [n] each. Reads the index of these."""
        starts, ends = self._corpus.bounds_of(self.first + documents)
        return starts - self._start, ends - self._start

    def _stranger(self, corpus: IndexedDataset, token: int) -> DataError:
        return DataError(
            f"{corpus.name}.bin holds the token id {token}, outside the vocabulary of {self._vocab_size}: "
            "train with the tokenizer that made this file, or preprocess the text with the run's tokenizer"
        )

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
