"""How one tensor of ours lies in one or several of another program's: each way there has its way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Transform(Protocol):
    """One tensor of ours ↔ one or several of theirs, bit for bit. Works on meta tensors too."""

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Their tensors, in the order in which the table names them; views where that is possible."""

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`to_theirs`."""


@dataclass(frozen=True)
class Plain:
    """The same tensor."""

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The tensor itself."""
        return [ours]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor itself."""
        return theirs[0]


@dataclass(frozen=True)
class Stacked:
    """Equal parts laid end to end along the rows here, tensors of their own there ([gate; up])."""

    parts: int = 2

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The parts."""
        return list(ours.chunk(self.parts))

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts, end to end."""
        return torch.cat(list(theirs))


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values: three tensors there, each with the rows of its heads in order.

    Here the rows are, for each key head: the query heads that share it, the key head, the value head. Works
    on weights [rows, hidden] and biases [rows].

    Attributes:
        kv_heads: key heads.
        queries_per_key: query heads that share one.
        size: rows of a head.
    """

    kv_heads: int
    queries_per_key: int
    size: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """[q, k, v]."""
        grouped = ours.unflatten(0, (self.kv_heads, self.queries_per_key + 2, self.size))
        return [part.flatten(0, 2) for part in grouped.split((self.queries_per_key, 1, 1), dim=1)]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The groups, end to end."""
        grouped = [part.unflatten(0, (self.kv_heads, -1, self.size)) for part in theirs]
        return torch.cat(grouped, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Interleaved:
    """Queries, keys and values of ``heads``; rows that rotate as a pair are neighbours there (GPT-J).

    Here they are half of the rotating rows apart.

    Attributes:
        heads: the rest of the way.
        rotating: rows of a head that rotate, the first ones.
    """

    heads: Heads
    rotating: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """[q, k, v]."""
        q, k, v = self.heads.to_theirs(ours)
        return [*(self._paired(part, (2, self.rotating // 2)) for part in (q, k)), v]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The groups of the rows in our order."""
        q, k, v = theirs
        return self.heads.to_ours([*(self._paired(part, (self.rotating // 2, 2)) for part in (q, k)), v])

    def _paired(self, rows: torch.Tensor, pairs: tuple[int, int]) -> torch.Tensor:
        """``rows`` with those of each head that rotate, seen as a matrix of ``pairs``, transposed."""
        size = self.heads.size
        turning, rest = rows.unflatten(0, (-1, size)).split((self.rotating, size - self.rotating), dim=1)
        turned = turning.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
        return torch.cat((turned, rest), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Joined:
    """What ``inner`` makes several tensors of is one there, laid end to end ([all q; all k; all v]).

    Attributes:
        inner: makes the parts.
        rows: rows of each part.
    """

    inner: Transform
    rows: tuple[int, ...]

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The parts of ``inner``, end to end."""
        return [torch.cat(self.inner.to_theirs(ours))]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``inner`` makes of the parts."""
        return self.inner.to_ours(theirs[0].split(self.rows))


@dataclass(frozen=True)
class Transposed:
    """Theirs are ``inner``'s, transposed (GPT-2's Conv1D keeps [in, out]); vectors stay as they are."""

    inner: Transform = Plain()

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The inner tensors, transposed."""
        return [tensor.t() for tensor in self.inner.to_theirs(ours)]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inner tensor of the transposed ones."""
        return self.inner.to_ours([tensor.t() for tensor in theirs])


@dataclass(frozen=True)
class Extended:
    """Ours has more rows than theirs, of which the further ones are the mean of theirs: on import only.

    Attributes:
        rows: theirs.
        more: rows beyond them.
    """

    rows: int
    more: int

    def to_theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Their rows."""
        return [ours[: self.rows]]

    def to_ours(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their rows and the further ones."""
        mean = theirs[0].float().mean(0, keepdim=True).to(theirs[0].dtype)
        return torch.cat([theirs[0], mean.expand(self.more, *mean.shape[1:])])


PLAIN = Plain()
