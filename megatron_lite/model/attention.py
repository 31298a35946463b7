"""The attention half of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite.model.initialize import output_init
from megatron_lite.model.kernels import ATTENTION_KERNELS, choose_kernel, masked_sdpa
from megatron_lite.model.linear import RowLinear
from megatron_lite.model.norms import head_norm
from megatron_lite.model.projections import query_key_value
from megatron_lite.model.rotary import Rotation, rotate
from megatron_lite.model.tiled import ring_attention
from megatron_lite.model.ulysses import own_tokens, whole_sequences
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places


class Attention(nn.Module):
    """Softmax attention, queries grouped (Ainslie et al., arXiv 2305.13245).

    Over all earlier tokens of the document, in both directions over all its tokens (Devlin et al., arXiv
    1810.04805); or over the near ones of them (Beltagy et al., arXiv 2004.05150).
    One matrix makes queries, keys and values. Its rows are, for each key head: the query heads that share it,
    then the key head, then the value head; with as many key heads as query heads this is GPT-NeoX's order.
    Each rank of the tensor axis has some of the heads.
    """

    def __init__(self, config: ModelSection, index: int, factory: ParameterFactory) -> None:
        super().__init__()
        self.index = index
        self.tensor = factory.tensor
        self.head_size = config.head_size
        self.kv_heads = max(1, config.num_kv_heads // self.tensor.size)
        self.queries_per_key = config.num_attention_heads // self.tensor.size // self.kv_heads
        self.dropout = config.attention_dropout
        self.backend = config.attention_backend
        self.causal = config.causal
        self.window = config.attention_windows[index]
        self.scale = config.attention_scale
        inner, bias = config.num_attention_heads * config.head_size, config.use_bias_in_attn_output
        self.query_key_value = query_key_value(config, factory.child("query_key_value"))
        self.q_norm = head_norm(config, factory.child("q_norm")) if config.use_qk_layernorm else None
        self.k_norm = head_norm(config, factory.child("k_norm")) if config.use_qk_layernorm else None
        self.dense = RowLinear(inner, config.hidden_size, bias, output_init(config), factory.child("dense"))

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None,
        cache: KVCache | None = None,
        places: Places | None = None,
    ) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, hidden]``."""
        q, k, v = self._heads(x, rotation)
        if cache is None:
            out = self._attend(q, k, v, places)
        else:
            out = masked_sdpa(q, *cache.append(self.index, k, v, self.window), self.scale)
        return self.dense(out.transpose(1, 2).flatten(2))

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Places | None
    ) -> torch.Tensor:
        """Attention over sequences, which other ranks may share; with dropout while training."""
        dropout = self.dropout if self.training else 0.0
        if not dropout:
            return self._attend_by_kernel(q, k, v, places, 0.0)
        with self.tensor.own_random_numbers(q.device):
            return self._attend_by_kernel(q, k, v, places, dropout)

    def _attend_by_kernel(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Places | None, dropout: float
    ) -> torch.Tensor:
        run = ATTENTION_KERNELS[choose_kernel(self.backend, q.device, q.dtype, q.shape[-1])].run
        length = places.length if places else q.shape[2]
        window = None if self.window is None or self.window >= length else self.window
        if places is None:
            return run(q, k, v, dropout, self.causal, window, None, self.scale)
        context = places.context
        if context.size == 1:
            return run(q, k, v, dropout, self.causal, window, places.documents, self.scale)
        if context.ring:
            return ring_attention(q, k, v, dropout, self.causal, window, places, self.scale)
        whole = whole_sequences(q, k, v, context.axis)
        out = run(*whole, dropout, self.causal, window, places.documents, self.scale)
        return own_tokens(out, context.axis)

    def _heads(
        self, x: torch.Tensor, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [b, heads, s, d], keys and values [b, kv_heads, s, d], normed and turned."""
        grouped = self.query_key_value(x).unflatten(-1, (self.kv_heads, -1, self.head_size))
        q, k, v = grouped.split((self.queries_per_key, 1, 1), dim=3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is None:
            q, k = q.permute(0, 2, 3, 1, 4), k.permute(0, 2, 3, 1, 4)
        else:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q.flatten(1, 2), k.flatten(1, 2), v.squeeze(3).transpose(1, 2)


ATTENTION_KINDS: dict[str, type[Attention]] = {"global": Attention, "local": Attention}
"""Kind in ``attention_config`` → class, built with (config, layer index, factory). To add one: a line here.

They differ in ``attention_windows``.
"""
