"""A linear layer whose parameters come from a factory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import zeros
from megatron_lite.parallel.parameter import Initializer, ParameterFactory


class Linear(nn.Module):
    """``x [..., inputs] → x weightᵀ + bias [..., outputs]``; weight [outputs, inputs], bias starts at 0."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, initializer: Initializer, factory: ParameterFactory
    ) -> None:
        super().__init__()
        self.weight = factory.make("weight", (outputs, inputs), initializer)
        self.bias = factory.make("bias", (outputs,), zeros) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return F.linear(x, self.weight, self.bias)
