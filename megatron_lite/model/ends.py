"""The layers before the first block and after the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import inner_init
from megatron_lite.model.norms import hidden_norm
from megatron_lite.model.positions import POSITIONS
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache


class Embedding(nn.Module):
    """Token ids → vectors, with learned positions added where the model has them, and ``hidden_dropout``."""

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        shape = (config.padded_vocab_size, config.hidden_size)
        self.weight = factory.child("embed_in").make("weight", shape, inner_init(config))
        make_positions = POSITIONS[config.pos_emb].embedding
        self.positions = make_positions(config, factory.child("embed_pos")) if make_positions else None
        self.dropout = config.hidden_dropout

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """``tokens [b, s]`` int64 → [b, s, hidden] in the parameters' dtype."""
        x = F.embedding(tokens, self.weight)
        if self.positions is not None:
            x = x + self.positions(tokens, cache)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class FinalNorm(nn.Module):
    """The norm between the last block and the head."""

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.norm = hidden_norm(config, factory.child("final_layer_norm"))

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, hidden]``."""
        return self.norm(x)


class Head(nn.Module):
    """Vectors → logits, by a matrix of its own or, tied, by the embedding's (the same Parameter object).

    The vocabulary's padding rows are trained like the others, towards ever smaller probabilities since no
    label names them. They are not masked, so that an exported model computes what the trained one did.
    """

    def __init__(
        self, config: ModelSection, factory: ParameterFactory, embedding: Embedding | None = None
    ) -> None:
        """A tied head without ``embedding`` (it is on another pipeline stage) makes the same matrix again."""
        super().__init__()
        if embedding is not None and not config.no_weight_tying:
            self.weight = embedding.weight
            return
        shape = (config.padded_vocab_size, config.hidden_size)
        name = "embed_out" if config.no_weight_tying else "embed_in"
        self.weight = factory.child(name).make("weight", shape, inner_init(config))

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, padded vocabulary]`` in the parameters' dtype."""
        return F.linear(x, self.weight)
