"""Running a list of layers, with activations kept or recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.model.block import Block

if TYPE_CHECKING:
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places


def run_layers(
    layers: Sequence[nn.Module], x: torch.Tensor, cache: KVCache | None, places: Places | None
) -> torch.Tensor:
    """``x`` through ``layers``, one after the other."""
    for layer in layers:
        x = layer(x, cache, places)
    return x


def run_recomputing(
    layers: Sequence[nn.Module], x: torch.Tensor, places: Places | None, every: int
) -> torch.Tensor:
    """``x`` through ``layers``, keeping only the input of each ``every`` consecutive blocks.

    What lies between is computed again in the backward, with the same dropout: one more forward of the
    blocks, and memory for the activations of ``every`` blocks instead of all (Chen et al., arXiv 1604.06174).
    """
    for is_block, group in groupby(layers, key=lambda layer: isinstance(layer, Block)):
        run = list(group)
        if not is_block:
            x = run_layers(run, x, None, places)
            continue
        for first in range(0, len(run), every):
            x = checkpoint(run_layers, run[first : first + every], x, None, places, use_reentrant=False)
    return x
