"""The attention half of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite.model.initialize import inner_init, output_init
from megatron_lite.model.kernels import ATTENTION_KERNELS, choose_kernel, masked_sdpa
from megatron_lite.model.linear import Linear
from megatron_lite.model.norms import head_norm
from megatron_lite.model.rotary import Rotation, rotate
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache


class Attention(nn.Module):
    """Causal softmax attention over all earlier tokens, queries grouped (Ainslie et al., arXiv 2305.13245).

    One matrix makes queries, keys and values. Its rows are, for each key head: the query heads that share it,
    then the key head, then the value head; with as many key heads as query heads this is GPT-NeoX's order.
    """

    def __init__(self, config: ModelSection, index: int, factory: ParameterFactory) -> None:
        super().__init__()
        self.index = index
        self.kv_heads, self.head_size = config.num_kv_heads, config.head_size
        self.queries_per_key = config.num_attention_heads // config.num_kv_heads
        self.dropout = config.attention_dropout
        self.backend = config.attention_backend
        inner, bias = config.num_attention_heads * config.head_size, config.use_bias_in_attn_linear
        rows = inner + 2 * config.num_kv_heads * config.head_size
        self.query_key_value = Linear(
            config.hidden_size, rows, bias, inner_init(config), factory.child("query_key_value")
        )
        self.q_norm = head_norm(config, factory.child("q_norm")) if config.use_qk_layernorm else None
        self.k_norm = head_norm(config, factory.child("k_norm")) if config.use_qk_layernorm else None
        self.dense = Linear(inner, config.hidden_size, bias, output_init(config), factory.child("dense"))

    def forward(self, x: torch.Tensor, rotation: Rotation | None, cache: KVCache | None) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, hidden]``."""
        q, k, v = self._heads(x, rotation)
        if cache is None:
            kernel = ATTENTION_KERNELS[choose_kernel(self.backend, q.device.type, q.dtype)]
            out = kernel.run(q, k, v, self.dropout if self.training else 0.0)
        else:
            out = masked_sdpa(q, *cache.append(self.index, k, v), cache.mask)
        return self.dense(out.transpose(1, 2).flatten(2))

    def _heads(
        self, x: torch.Tensor, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [b, heads, s, d], keys and values [b, kv_heads, s, d], normed and turned."""
        batch, length, _ = x.shape
        grouped = self.query_key_value(x).view(batch, length, self.kv_heads, -1, self.head_size)
        q, k, v = grouped.split((self.queries_per_key, 1, 1), dim=3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is None:
            q, k = q.permute(0, 2, 3, 1, 4), k.permute(0, 2, 3, 1, 4)
        else:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q.flatten(1, 2), k.flatten(1, 2), v.squeeze(3).transpose(1, 2)


ATTENTION_KINDS: dict[str, type[Attention]] = {"global": Attention, "flash": Attention}
"""Kind in ``attention_config`` → class, built with (config, layer index, factory). To add one: a line here.

``flash`` is GPT-NeoX's name for the same attention by another kernel, which here is ``attention_backend``'s
matter.
"""
