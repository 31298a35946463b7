"""Where the tokens that a model reads stand: in which document, at which position, on which rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from megatron_lite.parallel.sequence import WHOLE, ContextParallel

Bounds = tuple[tuple[int, ...], ...]
"""For each row of a micro-batch the places at which its documents begin, and its length."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents in the rows of a micro-batch; a token sees its own document only.

    Attributes:
        bounds: where they begin and end; numbers that the CPU knows, so that nothing waits for a device.
        device: where the model computes.
    """

    bounds: Bounds
    device: torch.device

    @cached_property
    def cumulative(self) -> torch.Tensor:
        """int32 [documents + 1] on the device: the same of all rows laid end to end, for flash attention."""
        first, places = 0, [0]
        for row in self.bounds:
            places += [first + place for place in row[1:]]
            first += row[-1]
        return _to_device(torch.tensor(places, dtype=torch.int32), self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(last - first for row in self.bounds for first, last in pairwise(row))


@dataclass(frozen=True, eq=False)
class Places:
    """What every layer wants to know about a micro-batch that is more than whole rows of one document each.

    Attributes:
        length: tokens of a whole sequence.
        documents: those of whole sequences; None: one a row.
        positions: int64 [s] or [b, s], the position of each token that is here; None: 0 ... s - 1.
        context: the ranks that share each sequence.
    """

    length: int
    documents: Documents | None = None
    positions: torch.Tensor | None = None
    context: ContextParallel = WHOLE


def places_of(
    starts: torch.Tensor | None,
    length: int,
    device: torch.device,
    context: ContextParallel = WHOLE,
    reset_positions: bool = False,
) -> Places | None:
    """The places of a micro-batch of whole sequences of ``length``; None when there is nothing to say.

    Args:
        starts: [b, length] on the CPU: for each token the place in its row at which its document begins.
        context: the ranks that share each sequence.
        reset_positions: count positions from the beginning of each document, not of the row.
    """
    if starts is None and context.size == 1:
        return None
    row = torch.arange(length)
    documents = None if starts is None else Documents(_bounds(starts), device)
    if starts is not None and reset_positions:
        positions = context.share(row - starts)
    elif context.size > 1:
        positions = context.share(row[None])[0]
    else:
        return Places(length, documents)
    return Places(length, documents, _to_device(positions, device), context)


def _bounds(starts: torch.Tensor) -> Bounds:
    begins = starts.numpy() == np.arange(starts.shape[1])
    return tuple((*np.flatnonzero(row).tolist(), starts.shape[1]) for row in begins)


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on ``device``; towards a GPU from pinned memory, without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
