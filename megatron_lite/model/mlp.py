"""The feed-forward half of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite.model.activations import ACTIVATIONS
from megatron_lite.model.initialize import inner_init, output_init
from megatron_lite.model.linear import ColumnLinear, RowLinear
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection


class MLP(nn.Module):
    """hidden → ffn_size → activation → hidden; a gated MLP's first matrix has twice the rows, [gate; up]."""

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.ffn_size, config.use_bias_in_mlp
        parts = 2 if config.is_gated else 1
        self.dense_h_to_4h = ColumnLinear(
            hidden, parts * inner, bias, inner_init(config), factory.child("dense_h_to_4h"), parts
        )
        self.activation = ACTIVATIONS[config.activation]
        self.dense_4h_to_h = RowLinear(
            inner, hidden, bias, output_init(config), factory.child("dense_4h_to_h")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, hidden]``."""
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))
