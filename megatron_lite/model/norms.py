"""Normalisations over the last dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import ones, zeros
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection


class LayerNorm(nn.Module):
    """Mean 0, variance 1, then weight and (optional) bias (Ba et al., arXiv 1607.06450)."""

    def __init__(
        self, size: int, epsilon: float, bias: bool, factory: ParameterFactory, partial: bool = False
    ) -> None:
        super().__init__()
        self.size, self.epsilon = (size,), epsilon
        self.weight = factory.make("weight", (size,), ones, partial=partial)
        self.bias = factory.make("bias", (size,), zeros, partial=partial) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size]`` normalised; statistics in fp32 whatever the dtype."""
        return F.layer_norm(x, self.size, self.weight, self.bias, self.epsilon)


class RMSNorm(nn.Module):
    """Mean square 1, then weight (Zhang and Sennrich, arXiv 1910.07467). It never has a bias."""

    def __init__(
        self, size: int, epsilon: float, bias: bool, factory: ParameterFactory, partial: bool = False
    ) -> None:
        super().__init__()
        self.size, self.epsilon = (size,), epsilon
        self.weight = factory.make("weight", (size,), ones, partial=partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size]`` normalised; statistics in fp32 whatever the dtype."""
        return F.rms_norm(x, self.size, self.weight, self.epsilon)


class NonParametricLayerNorm(nn.Module):
    """Mean 0, variance 1, and no parameters (OLMo, arXiv 2402.00838)."""

    def __init__(
        self, size: int, epsilon: float, bias: bool, factory: ParameterFactory, partial: bool = False
    ) -> None:
        super().__init__()
        self.size, self.epsilon = (size,), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size]`` normalised; statistics in fp32 whatever the dtype."""
        return F.layer_norm(x, self.size, eps=self.epsilon)


class ScaleNorm(nn.Module):
    """Length 1, then one weight, which begins as 1 (Nguyen and Salazar, arXiv 1910.05895; GPT-NeoX)."""

    def __init__(
        self, size: int, epsilon: float, bias: bool, factory: ParameterFactory, partial: bool = False
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = factory.make("weight", (1,), ones, partial=partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size] · weight / max(length of x, epsilon)``; in fp32 whatever the dtype."""
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        return (x * (self.weight / length.clamp(min=self.epsilon))).to(x.dtype)


NORMS: dict[str, type[LayerNorm | RMSNorm | NonParametricLayerNorm | ScaleNorm]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "non_parametric_layernorm": NonParametricLayerNorm,
    "scalenorm": ScaleNorm,
}
"""``norm`` → class, built with (size, epsilon, bias, factory, partial). To add one: a class and a line here.

``partial``: each tensor rank normalises a part only, as :meth:`ParameterFactory.make` means it.
"""


def hidden_norm(config: ModelSection, factory: ParameterFactory) -> nn.Module:
    """The configured norm of the residual stream."""
    size, epsilon, bias = config.hidden_size, config.norm_epsilon, config.use_bias_in_norms
    return NORMS[config.norm](size, epsilon, bias, factory, partial=factory.tensor.splits_sequence)


def head_norm(config: ModelSection, factory: ParameterFactory) -> nn.Module:
    """The configured norm of one query or key head, its weight shared by all heads, without a bias."""
    size, epsilon = config.head_size, config.norm_epsilon
    return NORMS[config.norm](size, epsilon, False, factory, partial=factory.tensor.size > 1)
