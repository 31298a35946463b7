"""Ulysses: ranks that share a sequence exchange its tokens for heads, and back (arXiv 2309.14509).

Between the two exchanges a rank has whole sequences of some heads, so that any kernel serves.
"""

from __future__ import annotations

import math

import torch

from megatron_lite.parallel.collectives import exchanged_evenly
from megatron_lite.parallel.context import Axis


def whole_sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some tokens of all heads → all tokens of some heads, in one exchange.

    ``q [b, heads, s / ranks, d]``, ``k`` and ``v [b, kv_heads, s / ranks, d]`` → [b, heads / ranks, s, d] and
    so on. Key heads that the ranks do not divide are copied so often that they do.
    """
    ranks = axis.size
    copies = ranks // math.gcd(k.shape[1], ranks)
    if copies > 1:
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    parts = [each.unflatten(1, (ranks, -1)) for each in (q, k, v)]
    mine = exchanged_evenly(
        torch.cat(parts, 2).transpose(0, 1), axis
    )  # [rank of the tokens, b, heads, s / ranks, d]
    whole = mine.permute(1, 2, 0, 3, 4).flatten(2, 3)
    q, k, v = whole.split([part.shape[2] for part in parts], dim=1)
    return q, k, v


def own_tokens(out: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The way back: ``[b, heads / ranks, s, d] → [b, heads, s / ranks, d]``."""
    parts = out.unflatten(2, (axis.size, -1)).permute(2, 0, 1, 3, 4)
    return exchanged_evenly(parts, axis).transpose(0, 1).flatten(1, 2)
