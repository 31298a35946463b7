"""How the model knows where a token stands: ``pos_emb`` by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.sections.rope import RopeScaling
from megatron_lite.model.frequencies import Rope
from megatron_lite.model.initialize import inner_init
from megatron_lite.model.rotary import Rotary, cos_and_sin
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places


SINUSOIDAL_BASE = 10000.0


class LearnedPositions(nn.Module):
    """One trained vector a position, ``max_position_embeddings`` of them.

    Before them stand ``opt_pos_emb_offset`` rows that nothing reads (Zhang et al., OPT, arXiv 2205.01068).
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.count, self.offset = config.max_position_embeddings, config.opt_pos_emb_offset
        shape = (self.count + self.offset, config.hidden_size)
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
            assert places.length <= self.count, f"{places.length} of {self.count} positions"
            return F.embedding(places.positions[..., part] + self.offset, self.weight)
        start = cache.length if cache else 0
        end = start + tokens.shape[1]
        assert end <= self.count, f"position {end} of a model that knows {self.count}"
        if cache is not None and cache.starts is not None:
            return F.embedding(cache.positions + self.offset, self.weight)
        return self.weight[self.offset + start : self.offset + end][part]


class SinusoidalPositions(nn.Module):
    """Sines, then cosines, of the position times hidden/2 frequencies, 1 to 1/10000 (arXiv 1706.03762).

    The order is GPT-NeoX's.
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.tensor, self.dtype = factory.tensor, factory.dtype
        length = config.max_position_embeddings
        self.rope = Rope(config.hidden_size, SINUSOIDAL_BASE, RopeScaling(), length, length)

    def forward(
        self, tokens: torch.Tensor, cache: KVCache | None, places: Places | None = None
    ) -> torch.Tensor:
        """Vectors [s, hidden] or [b, s, hidden], as :meth:`LearnedPositions.forward` gives them."""
        length = tokens.shape[1]
        cos, sin = cos_and_sin(self.rope, length, cache, places, tokens.device, self.dtype)
        return torch.cat((sin, cos), -1)[..., self.tensor.slice_of(length), :]


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
    "sinusoidal": Positions(embedding=SinusoidalPositions),
    "none": Positions(),
}
"""``pos_emb`` → what it adds. To add one: a line here."""
