"""How weights are drawn: GPT-NeoX's ``init_method`` and ``output_layer_init_method`` by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_lite.parallel.parameter import Initializer

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection


def zeros(value: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with 0: biases."""
    value.zero_()


def ones(value: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with 1: norm weights."""
    value.fill_(1.0)


def normal(std: float) -> Initializer:
    """Draw from N(0, std²)."""

    def draw(value: torch.Tensor, generator: torch.Generator) -> None:
        value.normal_(0.0, std, generator=generator)

    return draw


def orthogonal(gain: float) -> Initializer:
    """Draw a (semi-)orthogonal matrix times ``gain`` (Saxe et al., arXiv 1312.6120)."""

    def draw(value: torch.Tensor, generator: torch.Generator) -> None:
        nn.init.orthogonal_(value, gain, generator)

    return draw


def xavier_uniform(value: torch.Tensor, generator: torch.Generator) -> None:
    """Draw uniformly with variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010)."""
    nn.init.xavier_uniform_(value, generator=generator)


def xavier_normal(value: torch.Tensor, generator: torch.Generator) -> None:
    """Draw normally with variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010)."""
    nn.init.xavier_normal_(value, generator=generator)


INIT_METHODS: dict[str, Callable[[ModelSection], Initializer]] = {
    "normal": lambda config: normal(config.init_method_std),
    # GPT-2: the 2L layers that write into the residual stream are scaled down.
    "scaled_normal": lambda config: normal(config.init_method_std / math.sqrt(2 * config.num_layers)),
    # Parallel residual writes once a layer.
    "single_residual_scaled_normal": lambda config: normal(
        config.init_method_std / math.sqrt(config.num_layers)
    ),
    # Nguyen and Salazar, arXiv 1910.05895.
    "small_init": lambda config: normal(math.sqrt(2 / (5 * config.hidden_size))),
    # Wang and Komatsuzaki, GPT-J.
    "wang_init": lambda config: normal(2 / (config.num_layers * math.sqrt(config.hidden_size))),
    "xavier_uniform": lambda config: xavier_uniform,
    "xavier_normal": lambda config: xavier_normal,
    "orthogonal": lambda config: orthogonal(1.0),
    "scaled_orthogonal": lambda config: orthogonal(1 / math.sqrt(config.num_layers)),
}
"""``init_method`` → the initializer for a configuration. To add one: a line here."""


def inner_init(config: ModelSection) -> Initializer:
    """For embeddings, the head and the layers that read the residual stream (``init_method``)."""
    return INIT_METHODS[config.init_method](config)


def output_init(config: ModelSection) -> Initializer:
    """For the layers that write into the residual stream (``output_layer_init_method``)."""
    return INIT_METHODS[config.output_layer_init_method](config)
