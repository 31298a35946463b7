"""GPT-NeoX's ``pack_until_overflow`` and ``unpacked``: samples of whole documents."""

from __future__ import annotations

import numpy as np

from megatron_lite.data.permutation import Epochs
from megatron_lite.data.samples import Sample, laid_out
from megatron_lite.data.stretch import Stretch
from megatron_lite.utils.errors import DataError

DOCUMENTS_AT_ONCE = 1 << 20
"""Documents whose lengths are looked at together (some 40 MB)."""


class DocumentDataset:
    """Each sample is a row of whole documents that do not see each other, padded to ``seq_length`` places.

    A document of n tokens takes n - 1 places: after its last token there is nothing to be predicted. A longer
    one than a row holds is cut off behind its first seq_length + 1 tokens, or with ``allow_chopped`` false
    left out.

    - ``pack_until_overflow`` (``packs``): a row takes documents, in the order of the file, until the next one
      does not fit. The rows are shuffled anew each epoch. Opening looks at every document's length: about 0.1
      s for a million of them, and sixteen bytes a row are kept.
    - ``unpacked``: one document a row, shuffled anew each epoch. Opening reads nothing, unless
      ``allow_chopped`` is false.

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
        self._allow_chopped = allow_chopped
        self._padding = padding
        self._rows = self._find_rows(packs)
        if self._rows is not None and not len(self._rows):
            raise DataError(
                f"{stretch.name} has no document of 2 to seq_length + 1 = "
                f"{seq_length + 1} tokens: raise seq_length, or set allow_chopped"
            )
        self.tokens = stretch.tokens
        self.samples_per_epoch = stretch.documents if self._rows is None else len(self._rows)
        self._order = Epochs(self.samples_per_epoch, stretch.per_chunk(self.samples_per_epoch), seed)

    def __getitem__(self, sample: int) -> Sample:
        """Sample ``sample`` ≥ 0, counted through the epochs."""
        row = self._order(sample)
        first, last = (row, row + 1) if self._rows is None else self._rows[row].tolist()
        starts = self._stretch.document_starts(first, last)
        widths = self._widths(starts)
        self._stretch.announce(int(starts[0]))
        pieces = []
        for start, width in zip(starts.tolist(), widths.tolist(), strict=False):
            if width:
                tokens = self._stretch.read(start, start + width)
                pieces.append((tokens, self._stretch.read_labels(start + 1, start + width + 1)))
        return laid_out(pieces, self._length, self._padding)

    def _widths(self, starts: np.ndarray) -> np.ndarray:
        """Places that documents take which begin at ``starts`` (and end where the next one begins)."""
        widths = np.maximum(np.diff(starts) - 1, 0)
        if self._allow_chopped:
            return np.minimum(widths, self._length)
        return np.where(widths > self._length, 0, widths)

    def _find_rows(self, packs: bool) -> np.ndarray | None:
        """(first, last (exclusive)) document of each row, int64 [rows, 2]; None: one document a row."""
        if not packs and self._allow_chopped:
            return None
        parts = [np.empty((0, 2), np.int64)]
        first = 0
        while first < self._stretch.documents:
            last = min(first + DOCUMENTS_AT_ONCE, self._stretch.documents)
            widths = self._widths(self._stretch.document_starts(first, last))
            if packs:
                bounds = self._overflows(widths, is_end=last == self._stretch.documents)
            else:
                bounds = np.arange(len(widths) + 1)
            filled = np.add.reduceat(widths, bounds[:-1]) > 0
            parts.append(first + np.stack([bounds[:-1], bounds[1:]], axis=1)[filled])
            first += int(bounds[-1])
        return np.concatenate(parts)

    def _overflows(self, widths: np.ndarray, is_end: bool) -> np.ndarray:
        """Where the rows of consecutive documents of ``widths`` begin, and where the last one ends: int64.

        Unless these documents ``is_end`` of all, a last row that might take more of them is left out (if it
        is not the only one): it begins the next call.
        """
        ends = np.concatenate([[0], np.cumsum(widths)])
        overflow = (np.searchsorted(ends, ends[:-1] + self._length, side="right") - 1).tolist()
        bounds = [0]
        while bounds[-1] < len(widths):
            bounds.append(overflow[bounds[-1]])
        if not is_end and len(bounds) > 2:
            bounds.pop()
        return np.array(bounds)
