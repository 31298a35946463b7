"""What a data set gives: windows of text, or samples whose labels say for themselves what counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNCOUNTED = -100
"""The label of what is not in the loss (GPT-NeoX's and torch's value; any negative number means the same)."""


@dataclass(frozen=True)
class Sample:
    """Tokens with labels of their own.

    Attributes:
        tokens: int64 [seq_length].
        labels: int64 [seq_length], what is to be predicted at each token; negative: nothing.
        starts: int64 [seq_length], for each token the place at which its document begins, before which it
            must not see; None: it is one document.
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray | None = None


Window = np.ndarray
"""int64 [seq_length + 1]: each token's label is the next one."""


def as_sample(sample: Window | Sample) -> Sample:
    """A window with its labels spelled out; a sample as it is."""
    return sample if isinstance(sample, Sample) else Sample(sample[:-1], sample[1:])


def laid_out(pieces: Sequence[tuple[np.ndarray, np.ndarray]], length: int, padding: int) -> Sample:
    """Documents side by side in one row, each a document to the model too.

    Args:
        pieces: (tokens, labels) of each document, int64 [n], with ``length`` places at most together.
        length: places in the row.
        padding: the token in places that are left; nothing is to be predicted there.
    """
    tokens = np.full(length, padding, np.int64)
    labels = np.full(length, UNCOUNTED, np.int64)
    starts = np.empty(length, np.int64)
    place = 0
    for part, wanted in pieces:
        end = place + len(part)
        tokens[place:end], labels[place:end], starts[place:end] = part, wanted, place
        place = end
    starts[place:] = place
    return Sample(tokens, labels, starts)
