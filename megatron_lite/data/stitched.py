"""GPT-Neo's ``documents_random`` and ``documents_fixed``: samples that are cut out of documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_lite.data.permutation import Epochs
from megatron_lite.data.stretch import Stretch
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.seeds import derive_seed


@dataclass(frozen=True)
class Piece:
    """A document's place in the stream, and whether an end-of-document token is put behind it."""

    start: int
    stop: int
    add_eod: bool

    def __len__(self) -> int:
        return self.stop - self.start + self.add_eod


class StitchedDataset:
    """Each sample is ``stitch`` documents, joined by the end-of-document token, cut to seq_length + 1 tokens.

    The documents are shuffled anew each epoch; sample i of an epoch takes the i-th ``stitch`` of them (fewer
    than ``stitch`` at the end are left out). ``is_random`` takes a window anywhere in the joined text, else
    it is its beginning. Where the documents are too short together, the following ones are joined too.

    Attributes:
        samples_per_epoch: documents, divided by ``stitch``.
        tokens: tokens in the documents.

    Raises:
        DataError: there are fewer than ``stitch`` documents, or seq_length + 1 tokens; on fetch, a token is
            not in the vocabulary.
    """

    def __init__(
        self,
        stretch: Stretch,
        seq_length: int,
        seed: int,
        stitch: int,
        eod_id: int,
        is_random: bool,
    ) -> None:
        self._stretch = stretch
        stretch.require(seq_length + 1, "one sample of seq_length + 1")
        if stretch.documents < stitch:
            raise DataError(
                f"{stretch.name} has {stretch.documents} documents, fewer than stitch = {stitch} that make "
                "a sample: choose a smaller stitch, or give it more text"
            )
        self._length = seq_length + 1
        self._stitch = stitch
        self._eod_id = eod_id
        self._seed = seed
        self._is_random = is_random
        self.tokens = stretch.tokens
        self.samples_per_epoch = stretch.documents // stitch
        self._order = Epochs(stretch.documents, stretch.per_chunk(stretch.documents), seed)

    def __getitem__(self, sample: int) -> np.ndarray:
        """Sample ``sample`` ≥ 0, counted through the epochs: int64 [seq_length + 1]."""
        pieces = self._pieces(sample)
        spare = sum(map(len, pieces)) - self._length
        skipped = derive_seed(self._seed, "place", sample) % (spare + 1) if self._is_random else 0
        parts: list[np.ndarray] = []
        missing = self._length
        for piece in pieces:
            if skipped >= len(piece):
                skipped -= len(piece)
                continue
            tokens = self._read(piece, skipped, missing)
            skipped = 0
            parts.append(tokens)
            missing -= len(tokens)
        return np.concatenate(parts)

    def _pieces(self, sample: int) -> list[Piece]:
        """The documents of ``sample``, and further ones until they are long enough."""
        epoch, number = divmod(sample, self.samples_per_epoch)
        pieces: list[Piece] = []
        length = 0
        while len(pieces) < self._stitch or length < self._length:
            position = (number * self._stitch + len(pieces)) % self._stretch.documents
            start, stop = self._stretch.bounds(self._order(epoch * self._stretch.documents + position))
            if start < stop:
                self._stretch.announce(start)
            add_eod = start < stop and int(self._stretch.read(stop - 1, stop)[0]) != self._eod_id
            pieces.append(Piece(start, stop, add_eod))
            length += len(pieces[-1])
        last = pieces[-1]
        if last.add_eod and length > self._length:
            pieces[-1] = Piece(last.start, last.stop, add_eod=False)
        return pieces

    def _read(self, piece: Piece, skipped: int, limit: int) -> np.ndarray:
        """Up to ``limit`` tokens of ``piece`` after the first ``skipped``."""
        start = piece.start + skipped
        tokens = self._stretch.read(start, max(start, min(piece.stop, start + limit)))
        if piece.add_eod and len(tokens) < limit:
            tokens = np.append(tokens, self._eod_id)
        return tokens
