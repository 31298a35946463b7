"""The matrix that makes queries, keys and values, divided by heads over the ranks of the tensor axis.

Its rows are, for each key head: the query heads that share it, then the key head, then the value head. With
as many ranks as key heads, or fewer, a rank's share is a run of whole groups of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite.model.initialize import inner_init, zeros
from megatron_lite.model.linear import ColumnLinear
from megatron_lite.parallel.parameter import ParameterFactory, Shard

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection


class SharedKeyLinear(nn.Module):
    """The projection with fewer key heads than ranks: neighbours keep copies of the key head that they share.

    A rank has its query heads of one group, and all of the group's key and value. The two are parameters of
    their own, since the norm of the gradient counts the queries of every rank but each key once.
    """

    def __init__(self, config: ModelSection, rows: int, factory: ParameterFactory) -> None:
        super().__init__()
        self.tensor = factory.tensor
        rank, size = self.tensor.axis.rank, self.tensor.size
        copies = size // config.num_kv_heads
        own = config.num_attention_heads // size * config.head_size
        group_rows = rows // config.num_kv_heads
        group = rank // copies * group_rows
        first, keys = group + rank % copies * own, group + copies * own
        query = Shard(0, ((first, first + own),))
        key_value = Shard(0, ((keys, group + group_rows),), copies)
        shape, draw = (rows, config.hidden_size), inner_init(config)
        self.query = factory.make("weight", shape, draw, query)
        self.key_value = factory.make("weight", shape, draw, key_value)
        bias = config.use_bias_in_qkv
        self.query_bias = factory.make("bias", (rows,), zeros, query) if bias else None
        self.key_value_bias = factory.make("bias", (rows,), zeros, key_value) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream → this rank's [queries; key; value]."""
        bias = None
        if self.query_bias is not None and self.key_value_bias is not None:
            bias = torch.cat([self.query_bias, self.key_value_bias])
        return self.tensor.column_linear(x, torch.cat([self.query, self.key_value]), bias)


def query_key_value(config: ModelSection, factory: ParameterFactory) -> nn.Module:
    """The projection, as this rank has it."""
    rows = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_size
    if config.num_kv_heads < factory.tensor.size:
        return SharedKeyLinear(config, rows, factory)
    bias = config.use_bias_in_qkv
    return ColumnLinear(config.hidden_size, rows, bias, inner_init(config), factory)
