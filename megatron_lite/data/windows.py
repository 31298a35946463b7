"""Samples: windows of a token stream, in a shuffled order that is computed, not stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_lite.data.blend import Blend
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.permutation import KeyedPermutation
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.seeds import derive_seed


class Dataset(Protocol):
    """An endless sequence of samples; sample i depends on i alone."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which the data begins again."""

    @property
    def tokens(self) -> int:
        """Tokens in the data."""

    def __getitem__(self, sample: int) -> np.ndarray:
        """Sample ``sample`` ≥ 0: int64 [seq_length + 1]."""


class WindowDataset:
    """The windows of the documents ``first``…``last`` (exclusive) of a corpus, shuffled anew each epoch.

    The documents are one stream of tokens; window w is ``stream[w·s : w·s + s + 1]`` for s = ``seq_length``,
    so windows share one token: each token but the first is predicted once an epoch. Sample i of epoch e is
    window π(i) for a permutation π keyed by ``seed`` and e. Opening reads nothing; a sample reads its window.

    Attributes:
        samples_per_epoch: windows in the stream.
        tokens: tokens in the stream.

    Raises:
        DataError: the documents are too few for one window; on fetch, a token is not in the vocabulary.
    """

    def __init__(
        self,
        corpus: IndexedDataset,
        documents: tuple[int, int],
        seq_length: int,
        vocab_size: int,
        seed: int,
        split: str,
    ) -> None:
        first, last = documents
        self.seq_length = seq_length
        self._corpus = corpus
        self._vocab_size = vocab_size
        self._seed = seed
        self._start = corpus.token_start(first)
        self.tokens = corpus.token_start(last) - self._start
        self.samples_per_epoch = max(0, self.tokens - 1) // seq_length
        if self.samples_per_epoch == 0:
            raise DataError(
                f"the {split} split of {corpus.prefix} has {last - first} of {corpus.document_count} "
                f"documents and {self.tokens} tokens, fewer than one sample of seq_length + 1 = "
                f"{seq_length + 1}: give it more text, a larger share (split), or shorten seq_length"
            )
        self._epoch = -1
        self._order = KeyedPermutation(1, 0)

    def __getitem__(self, sample: int) -> np.ndarray:
        """Sample ``sample`` ≥ 0, counted through the epochs: int64 [seq_length + 1]."""
        epoch, position = divmod(sample, self.samples_per_epoch)
        if epoch != self._epoch:
            self._order = KeyedPermutation(self.samples_per_epoch, derive_seed(self._seed, "epoch", epoch))
            self._epoch = epoch
        start = self._start + self._order(position) * self.seq_length
        window = self._corpus.tokens[start : start + self.seq_length + 1].astype(np.int64)
        if window.max() >= self._vocab_size or window.min() < 0:
            self._refuse(window)
        return window

    def _refuse(self, window: np.ndarray) -> None:
        wrong = window[(window >= self._vocab_size) | (window < 0)][0]
        raise DataError(
            f"{self._corpus.bin_path} holds the token id {wrong}, outside the vocabulary of "
            f"{self._vocab_size}: train with the tokenizer that made this file, or preprocess the text "
            "with the run's tokenizer"
        )


class BlendedDataset:
    """Several datasets mixed in proportion to weights; see :mod:`megatron_lite.data.blend`.

    Attributes:
        samples_per_epoch: the parts' windows together (a part with a high weight begins again earlier).
        tokens: the parts' tokens together.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float]) -> None:
        assert len(parts) == len(weights), "one weight a dataset"
        self.parts = parts
        self.samples_per_epoch = sum(part.samples_per_epoch for part in parts)
        self.tokens = sum(part.tokens for part in parts)
        self._blend = Blend(weights)

    def __getitem__(self, sample: int) -> np.ndarray:
        """Sample ``sample`` ≥ 0: int64 [seq_length + 1]."""
        part, index = self._blend.locate(sample)
        return self.parts[part][index]
