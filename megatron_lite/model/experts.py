"""The experts of a layer: as many MLPs as there are, on rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.activations import ACTIVATIONS
from megatron_lite.model.initialize import inner_init, output_init, zeros
from megatron_lite.parallel.parameter import ParameterFactory, even_shard

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection

ExpertLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(rows [n, inputs] sorted by expert, weights [experts, outputs, inputs], biases [experts, outputs] or None,
counts of each expert's rows [experts] int64) → [n, outputs]."""


def one_by_one(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """One matrix product for each expert, everywhere; on an accelerator it waits for the counts."""
    biases = [None] * len(weight) if bias is None else bias.unbind()
    parts = zip(rows.split(counts.tolist()), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(part, own, add) for part, own, add in parts])


def grouped(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """All products in one kernel (CUTLASS on CUDA), which reads the counts on the device."""
    out = F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    return out if bias is None else out + bias.repeat_interleave(counts, 0, output_size=len(rows))


def choose_expert_linear(device: str, dtype: torch.dtype, *widths: int) -> ExpertLinear:
    """``grouped`` where it has a fast kernel: bf16 on CUDA, rows of whole 16 bytes."""
    fits = dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)
    return grouped if device == "cuda" and fits else one_by_one


class Experts(nn.Module):
    """The experts of one layer that are on this rank, each the MLP of a dense layer (:class:`MLP`).

    Experts are divided over the expert axis, and the inner width of each over the tensor axis. What comes out
    is this tensor rank's share of a sum. Each rank has a part of the last bias, too, and adds it to those
    channels of its share: so no element of an expert is on two tensor ranks.
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        hidden, inner, experts = config.hidden_size, config.ffn_size, config.moe_num_experts
        parts, axis = (2 if config.is_gated else 1), factory.tensor.axis
        self.activation = ACTIVATIONS[config.activation]
        up, down = (parts * inner, hidden), (hidden, inner)
        columns = even_shard(0, parts * inner, axis, parts)
        self.weight_in = factory.make_experts(
            "dense_h_to_4h.weight", experts, up, inner_init(config), columns
        )
        self.weight_out = factory.make_experts(
            "dense_4h_to_h.weight", experts, down, output_init(config), even_shard(1, inner, axis)
        )
        self.bias_in = self.bias_out = None
        if config.use_bias_in_mlp:
            self.bias_in = factory.make_experts("dense_h_to_4h.bias", experts, up[:1], zeros, columns)
            own = even_shard(0, hidden, axis)
            self.bias_out = factory.make_experts("dense_4h_to_h.bias", experts, down[:1], zeros, own)
        share = hidden // axis.size
        self._channels = (axis.rank * share, hidden - (axis.rank + 1) * share)
        self._widths = (hidden, inner // axis.size)

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``rows [n, hidden]`` sorted by expert, ``counts`` [experts here] of each → [n, hidden]."""
        linear = choose_expert_linear(rows.device.type, rows.dtype, *self._widths)
        bias = None if self.bias_out is None else F.pad(self.bias_out, self._channels)
        inner = self.activation(linear(rows, self.weight_in, self.bias_in, counts))
        return linear(inner, self.weight_out, bias, counts)
