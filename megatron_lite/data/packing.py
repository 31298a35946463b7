"""GPT-NeoX's ``pack_until_overflow`` and ``unpacked``: samples of whole documents."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megatron_lite.data.permutation import Epochs, PooledShuffle
from megatron_lite.data.samples import Sample, laid_out
from megatron_lite.data.stretch import Stretch
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.seeds import derive_seed

POOLS_KEPT = 3
"""Pools of documents whose order is kept: rows that follow each other are of two or three."""


class DocumentDataset:
    """Each sample is a row of whole documents that do not see each other, padded to ``seq_length`` places.

    A document of n tokens takes n - 1 places: after its last token there is nothing to be predicted. A longer
    one than a row holds is cut off behind its first seq_length + 1 tokens, or with ``allow_chopped`` false
    left out.

    - ``pack_until_overflow`` (``packs``): the documents are shuffled once (in pools, see
      :class:`PooledShuffle`), and a row takes the next of them until one does not fit. The rows stay, and
      come in another order each epoch: so an epoch is every document once, and its samples are as many.
    - ``unpacked``: one document a row, shuffled anew each epoch.

    Opening looks at every document's length, about 0.25 s for a million of them, and keeps eight bytes a row;
    not so where all documents have a row of their own, without which nothing is read.

    Attributes:
        samples_per_epoch: rows.
        tokens: tokens in the documents, those that are cut off or left out included.

    Raises:
        DataError: there is no document with something to predict; on fetch, a token is not in the vocabulary.
    """

    def __init__(
        self,
        stretch: Stretch,
        seq_length: int,
        seed: int,
        packs: bool,
        allow_chopped: bool,
        padding: int,
    ) -> None:
        self._stretch = stretch
        stretch.require(2, "the two of a document with something to predict")
        self._length = seq_length
        self._packs = packs
        self._allow_chopped = allow_chopped
        self._padding = padding
        self.tokens = stretch.tokens
        chunk = stretch.per_chunk(stretch.documents)
        self._has_rows = packs or not allow_chopped
        if not self._has_rows:
            self.samples_per_epoch = stretch.documents
            self._order = Epochs(stretch.documents, chunk, seed)
            return
        shuffle = PooledShuffle(stretch.documents, chunk, derive_seed(seed, "documents"))
        self._pool = lru_cache(POOLS_KEPT)(shuffle)
        rows = [self._rows_of(shuffle(pool)) for pool in range(shuffle.pools)]
        self._rows = np.concatenate(rows)
        self._first_rows = np.cumsum([0, *map(len, rows)])
        self.samples_per_epoch = len(self._rows)
        if not self.samples_per_epoch:
            raise DataError(
                f"{stretch.name} has no document of 2 to seq_length + 1 = "
                f"{seq_length + 1} tokens: raise seq_length, or set allow_chopped"
            )
        self._order = Epochs(self.samples_per_epoch, -(-len(self._rows) // shuffle.pools), seed, pool=1)

    def __getitem__(self, sample: int) -> Sample:
        """Sample ``sample`` ≥ 0, counted through the epochs."""
        starts, ends = self._stretch.bounds_of(self._documents(self._order(sample)))
        widths = self._widths(ends - starts)
        pieces = []
        for start, width in zip(starts.tolist(), widths.tolist(), strict=True):
            if width:
                self._stretch.announce(start)
                tokens = self._stretch.read(start, start + width)
                pieces.append((tokens, self._stretch.read_labels(start + 1, start + width + 1)))
        return laid_out(pieces, self._length, self._padding)

    def _documents(self, row: int) -> np.ndarray:
        """The documents of ``row``: int64."""
        if not self._has_rows:
            return np.array([row])
        pool = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        first, last = self._rows[row].tolist()
        return self._pool(pool)[first:last]

    def _widths(self, lengths: np.ndarray) -> np.ndarray:
        """Places that documents of ``lengths`` take."""
        widths = np.maximum(lengths - 1, 0)
        if self._allow_chopped:
            return np.minimum(widths, self._length)
        return np.where(widths > self._length, 0, widths)

    def _rows_of(self, documents: np.ndarray) -> np.ndarray:
        """Where in ``documents`` each row of them begins, and where it ends (exclusive): int32 [rows, 2]."""
        starts, ends = self._stretch.bounds_of(documents)
        widths = self._widths(ends - starts)
        bounds = self._overflows(widths) if self._packs else np.arange(len(widths) + 1)
        filled = np.add.reduceat(widths, bounds[:-1]) > 0
        return np.stack([bounds[:-1], bounds[1:]], axis=1)[filled].astype(np.int32)

    def _overflows(self, widths: np.ndarray) -> np.ndarray:
        """Where the rows of documents of ``widths``, in this order, begin, and where the last one ends."""
        ends = np.concatenate([[0], np.cumsum(widths)])
        overflow = (np.searchsorted(ends, ends[:-1] + self._length, side="right") - 1).tolist()
        bounds = [0]
        while bounds[-1] < len(widths):
            bounds.append(overflow[bounds[-1]])
        return np.array(bounds)
