"""Linear layers whose parameters come from a factory, divided over the ranks of the tensor axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import zeros
from megatron_lite.parallel.parameter import Initializer, ParameterFactory, even_shard


class ColumnLinear(nn.Module):
    """``x → x weightᵀ + bias``, each tensor rank computing its share of the outputs.

    The whole weight is [outputs, inputs]; the bias starts at 0. Where the outputs are ``parts`` things side
    by side ([gate; up]), each rank has its share of each.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        initializer: Initializer,
        factory: ParameterFactory,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.tensor = factory.tensor
        shard = even_shard(0, outputs, self.tensor.axis, parts)
        self.weight = factory.make("weight", (outputs, inputs), initializer, shard)
        self.bias = factory.make("bias", (outputs,), zeros, shard) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream [b, s, inputs] → this rank's [b, s, outputs / ranks]."""
        return self.tensor.column_linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """``x → x weightᵀ + bias``, each tensor rank multiplying its share of the inputs.

    The whole weight is [outputs, inputs]. The bias, which starts at 0, is added once, to the sum of the
    ranks' shares.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, initializer: Initializer, factory: ParameterFactory
    ) -> None:
        super().__init__()
        self.tensor = factory.tensor
        shard = even_shard(1, inputs, self.tensor.axis)
        self.weight = factory.make("weight", (outputs, inputs), initializer, shard)
        partial = self.tensor.splits_sequence
        self.bias = factory.make("bias", (outputs,), zeros, partial=partial) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's [b, s, inputs / ranks] → the residual stream [b, s, outputs]."""
        if self.tensor.size == 1:
            return F.linear(x, self.weight, self.bias)
        total = self.tensor.leave(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias
