"""Samples: windows of a token stream, in a shuffled order that is computed, not stored."""

from __future__ import annotations

from typing import Protocol

from megatron_lite.data.permutation import Epochs
from megatron_lite.data.samples import Sample, Window
from megatron_lite.data.stretch import Stretch

SAMPLES_AHEAD = 512
"""So many samples before its turn, the chunk of a sample is announced: at the beginning of a pool of chunks
nearly every sample needs one that was not read before, and none should wait for a slow disk or network."""


class Dataset(Protocol):
    """An endless sequence of samples; sample i depends on i alone."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which the data begins again."""

    @property
    def tokens(self) -> int:
        """Tokens in the data."""

    def __getitem__(self, sample: int) -> Window | Sample:
        """Sample ``sample`` ≥ 0. A data set gives windows only, or samples with labels only."""


class WindowDataset:
    """The windows of a stretch of documents, shuffled anew each epoch.

    The documents are one stream of tokens; window w is ``stream[w·s : w·s + s + 1]`` for s = ``seq_length``,
    so windows share one token: each token but the first is predicted once an epoch. Sample i of epoch e is
    window π(i) for a permutation π keyed by ``seed`` and e. Opening reads nothing; a sample reads its window.
    Where the stretch has labels (see :class:`Stretch`) samples have labels of their own.

    Attributes:
        samples_per_epoch: windows in the stream.
        tokens: tokens in the stream.

    Raises:
        DataError: the documents are too few for one window; on fetch, a token is not in the vocabulary.
    """

    def __init__(self, stretch: Stretch, seq_length: int, seed: int) -> None:
        self.seq_length = seq_length
        self._stretch = stretch
        self._stretch.require(seq_length + 1, "one sample of seq_length + 1")
        self.tokens = self._stretch.tokens
        self.samples_per_epoch = (self.tokens - 1) // seq_length
        chunk = max(1, self._stretch.tokens_per_chunk // seq_length)
        self._stretch.tokens_per_chunk = chunk * seq_length
        self._order = Epochs(self.samples_per_epoch, chunk, seed)
        self._order_ahead = Epochs(self.samples_per_epoch, chunk, seed)  # each remembers the pool where it is

    def __getitem__(self, sample: int) -> Window | Sample:
        """Sample ``sample`` ≥ 0, counted through the epochs."""
        self._stretch.announce(self._order_ahead(sample + SAMPLES_AHEAD) * self.seq_length)
        start = self._order(sample) * self.seq_length
        self._stretch.announce(start)
        return self._stretch.sample(start, start + self.seq_length + 1)


class ChunkDataset:
    """GPT-Neo's ``chunks``: records of seq_length + 1 tokens, one after another, in the order of the file.

    Nothing is shuffled; every epoch is the same. The attributes and errors are those of
    :class:`WindowDataset`.
    """

    def __init__(self, stretch: Stretch, seq_length: int) -> None:
        self._length = seq_length + 1
        self._stretch = stretch
        self._stretch.require(self._length, "one sample of seq_length + 1")
        self.tokens = self._stretch.tokens
        self.samples_per_epoch = self.tokens // self._length

    def __getitem__(self, sample: int) -> Window | Sample:
        """Sample ``sample`` ≥ 0, counted through the epochs."""
        start = sample % self.samples_per_epoch * self._length
        self._stretch.announce(start)
        return self._stretch.sample(start, start + self._length)
