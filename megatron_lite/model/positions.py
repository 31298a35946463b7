"""How the model knows where a token stands: ``pos_emb`` by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import inner_init
from megatron_lite.model.rotary import Rotary
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places


class LearnedPositions(nn.Module):
    """One trained vector a position, ``max_position_embeddings`` of them."""

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        shape = (config.max_position_embeddings, config.hidden_size)
        self.tensor = factory.tensor
        partial = self.tensor.splits_sequence
        self.weight = factory.make("weight", shape, inner_init(config), partial=partial)

    def forward(
        self, tokens: torch.Tensor, cache: KVCache | None, places: Places | None = None
    ) -> torch.Tensor:
        """Vectors [s, hidden] or [b, s, hidden] for ``tokens [b, s]``, which follow those in ``cache``.

        Those of this rank's slice, where tensor ranks split the sequence.
        """
        part = self.tensor.slice_of(tokens.shape[1])
        if places is not None and places.positions is not None:
            assert places.length <= self.weight.shape[0], (
                f"{places.length} of {self.weight.shape[0]} positions"
            )
            return F.embedding(places.positions[..., part], self.weight)
        start = cache.length if cache else 0
        end = start + tokens.shape[1]
        assert end <= self.weight.shape[0], f"position {end} of a model that knows {self.weight.shape[0]}"
        if cache is not None and cache.starts is not None:
            return F.embedding(cache.positions, self.weight)
        return self.weight[start:end][part]


@dataclass(frozen=True)
class Positions:
    """Where a kind of positions enters the model.

    Attributes:
        embedding: makes the module whose output is added to the token embeddings, if any.
        rotary: makes the rotation of queries and keys, if any.
    """

    embedding: Callable[[ModelSection, ParameterFactory], nn.Module] | None = None
    rotary: Callable[[ModelSection], Rotary] | None = None


POSITIONS: dict[str, Positions] = {
    "rotary": Positions(rotary=Rotary),
    "learned": Positions(embedding=LearnedPositions),
    "none": Positions(),
}
"""``pos_emb`` → what it adds. To add one: a line here."""
