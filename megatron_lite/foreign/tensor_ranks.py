"""How one tensor lies in the files of several tensor ranks; each way there has its way back.

They are transforms as those of Hugging Face families: one tensor of ours, a list of theirs, rank by rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lite.hf.transforms import PLAIN, Transform


@dataclass(frozen=True)
class Divided:
    """Each rank has an equal share along ``dim``, as ``inner`` makes one tensor of it."""

    ranks: int
    dim: int = 0
    inner: Transform = PLAIN

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The shares."""
        return [
            theirs
            for share in ours.tensor_split(self.ranks, self.dim)
            for theirs in self.inner.to_theirs(share)
        ]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The shares, end to end."""
        return torch.cat([self.inner.to_ours([share]) for share in theirs], self.dim)


@dataclass(frozen=True)
class Copied:
    """Each rank has the whole; where rounding has led copies apart, their mean is taken, as by GPT-NeoX."""

    ranks: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The tensor itself, again and again."""
        return [ours] * self.ranks

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor, or the mean in fp64."""
        first, *others = theirs
        if all(torch.equal(first, other) for other in others):
            return first
        return torch.stack([copy.double() for copy in theirs]).mean(0)


@dataclass(frozen=True)
class Summed:
    """Each rank adds its own to its part of the output, before the parts are summed."""

    ranks: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Equal summands."""
        return [ours / self.ranks] * self.ranks

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum, in fp64 where there is one to make."""
        return theirs[0] if len(theirs) == 1 else torch.stack([each.double() for each in theirs]).sum(0)


@dataclass(frozen=True)
class UpAndGate:
    """A gated MLP's first matrix: here [gate; up], there [up; gate] of each rank's share of both."""

    ranks: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """[up; gate] of each rank."""
        gate, up = (half.tensor_split(self.ranks) for half in ours.chunk(2))
        return [torch.cat(pair) for pair in zip(up, gate, strict=True)]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """All gates, then all others."""
        halves = [share.chunk(2) for share in theirs]
        return torch.cat([gate for _, gate in halves] + [up for up, _ in halves])


@dataclass(frozen=True)
class SlicedHeads:
    """Grouped queries as GPT-NeoX had them until November 2024: behind each query head an equal slice of the
    rows of its key head, and then of its value head.

    Attributes:
        kv_heads: key heads.
        queries_per_key: query heads that share one.
        size: rows of a head.
    """

    kv_heads: int
    queries_per_key: int
    size: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The query heads, each with its slices."""
        grouped = ours.unflatten(0, (self.kv_heads, self.queries_per_key + 2, self.size))
        queries, *others = grouped.split((self.queries_per_key, 1, 1), dim=1)
        slices = [part.squeeze(1).unflatten(1, (self.queries_per_key, -1)) for part in others]
        return [torch.cat([queries, *slices], dim=2).flatten(0, 2)]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each key head: its query heads, itself, its value head."""
        part = self.size // self.queries_per_key
        heads = theirs[0].unflatten(0, (self.kv_heads, self.queries_per_key, self.size + 2 * part))
        queries, *slices = heads.split((self.size, part, part), dim=2)
        whole = [each.flatten(1, 2).unsqueeze(1) for each in slices]
        return torch.cat([queries, *whole], dim=1).flatten(0, 2)
