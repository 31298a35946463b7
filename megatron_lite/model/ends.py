"""The layers before the first block and after the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import inner_init, zeros
from megatron_lite.model.norms import hidden_norm
from megatron_lite.model.positions import POSITIONS
from megatron_lite.parallel.parameter import ParameterFactory, even_shard

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places


class Embedding(nn.Module):
    """Token ids → vectors, with learned positions added where the model has them, and ``hidden_dropout``.

    Each tensor rank has a range of the vocabulary and looks up what falls into it.
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.tensor = factory.tensor
        self.weight = _vocabulary_matrix(config, factory.child("embed_in"))
        make_positions = POSITIONS[config.pos_emb].embedding
        self.positions = make_positions(config, factory.child("embed_pos")) if make_positions else None
        self.dropout = config.hidden_dropout

    def forward(
        self, tokens: torch.Tensor, cache: KVCache | None = None, places: Places | None = None
    ) -> torch.Tensor:
        """``tokens [b, s]`` int64 → the residual stream [b, s, hidden] in the parameters' dtype."""
        x = F.embedding(tokens, self.weight) if self.tensor.size == 1 else self._look_up_together(tokens)
        if self.positions is not None:
            x = x + self.positions(tokens, cache, places)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def _look_up_together(self, tokens: torch.Tensor) -> torch.Tensor:
        count = len(self.weight)
        own = tokens - self.tensor.axis.rank * count
        elsewhere = (own < 0) | (own >= count)
        found = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.tensor.leave(found.masked_fill(elsewhere[..., None], 0.0))


class FinalNorm(nn.Module):
    """The norm between the last block and the head."""

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.norm = hidden_norm(config, factory.child("final_layer_norm"))

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, places: Places | None = None
    ) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, hidden]``."""
        return self.norm(x)


class Head(nn.Module):
    """Vectors → logits, by a matrix of its own or, tied, by the embedding's (the same Parameter object).

    One of its own may have a bias (``use_bias_in_head``).

    The vocabulary's padding rows are trained like the others, towards ever smaller probabilities since no
    label names them. They are not masked, so that an exported model computes what the trained one did.
    """

    def __init__(
        self, config: ModelSection, factory: ParameterFactory, embedding: Embedding | None = None
    ) -> None:
        """A tied head without ``embedding`` (it is on another pipeline stage) makes the same matrix again."""
        super().__init__()
        self.tensor = factory.tensor
        tied = not config.no_weight_tying
        if tied and embedding is not None:
            self.weight = embedding.weight
        else:
            self.weight = _vocabulary_matrix(config, factory.child("embed_in" if tied else "embed_out"))
        self.bias = None
        if config.use_bias_in_head:
            rows = config.padded_vocab_size
            shard = even_shard(0, rows, self.tensor.axis)
            self.bias = factory.child("embed_out").make("bias", (rows,), zeros, shard)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, places: Places | None = None
    ) -> torch.Tensor:
        """The residual stream → this rank's [b, s, padded vocabulary / ranks] in the parameters' dtype."""
        return self.tensor.column_linear(x, self.weight, self.bias)


def _vocabulary_matrix(config: ModelSection, factory: ParameterFactory) -> nn.Parameter:
    """One row a token, [padded vocabulary, hidden], the rows divided over the tensor ranks."""
    shape = (config.padded_vocab_size, config.hidden_size)
    shard = even_shard(0, config.padded_vocab_size, factory.tensor.axis)
    return factory.make("weight", shape, inner_init(config), shard)
