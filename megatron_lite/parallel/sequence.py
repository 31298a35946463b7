"""Context parallelism as a sequence sees it: which of its tokens are whose.

The ranks of the context axis share each sequence. Where they exchange heads (Ulysses, Jacobs et al., arXiv
2309.14509) each has a run of it; where keys and values go round (ring attention, Liu et al., arXiv
2310.01889) each has two: of 2n equal chunks rank r has r and 2n - 1 - r, so that all have the same work under
a causal mask, n = 4::

    chunk   0    1    2    3    4    5    6    7
    rank    0    1    2    3    3    2    1    0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lite.parallel.context import ALONE, Axis


@dataclass(frozen=True)
class ContextParallel:
    """The context axis, and how a sequence is divided along it.

    Attributes:
        axis: the ranks that share each sequence.
        ring: whether keys and values go round; else heads are exchanged. Of no effect with one rank.
    """

    axis: Axis = ALONE
    ring: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.axis.size

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of whole sequences: ``x [b, s, ...] → [b, s / size, ...]``."""
        if self.size == 1:
            return x
        runs = token_runs(x.shape[1], self.size, self.axis.rank, self.ring)
        return torch.cat([x[:, run.start : run.stop] for run in runs], dim=1)


WHOLE = ContextParallel()
"""Sequences that nobody shares."""


def token_runs(length: int, ranks: int, rank: int, ring: bool) -> list[range]:
    """The places in a sequence of ``length`` of the tokens that ``rank`` has, in the order in which it has
    them.

    >>> token_runs(16, 4, 1, ring=True)
    [range(2, 4), range(12, 14)]
    """
    if ranks == 1:
        return [range(length)]
    chunk = length // (2 * ranks if ring else ranks)
    chunks = [rank, 2 * ranks - 1 - rank] if ring else [rank]
    return [range(number * chunk, (number + 1) * chunk) for number in chunks]
