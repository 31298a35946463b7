"""The GPT as one list of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_lite.model.block import Block
from megatron_lite.model.cache import KVCache
from megatron_lite.model.ends import Embedding, FinalNorm, Head
from megatron_lite.model.kernels import choose_kernel
from megatron_lite.model.places import Places
from megatron_lite.model.recompute import run_layers, run_recomputing
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config import Config
    from megatron_lite.config.sections.model import ModelSection


@dataclass(frozen=True)
class LayerPlan:
    """A layer that is not built yet: its class and the arguments of its constructor."""

    kind: type[nn.Module]
    arguments: tuple[Any, ...]

    def build(self, *more: object) -> nn.Module:
        """The layer, its parameters drawn."""
        return self.kind(*self.arguments, *more)


def layer_plans(config: ModelSection, factory: ParameterFactory) -> list[LayerPlan]:
    """The layers of a :class:`GPT` in order, so that a pipeline stage builds its own and no others."""
    blocks = [
        LayerPlan(Block, (config, index, factory.child(f"layers.{index}")))
        for index in range(config.num_layers)
    ]
    ends = [LayerPlan(kind, (config, factory)) for kind in (Embedding, FinalNorm, Head)]
    return [ends[0], *blocks, *ends[1:]]


class GPT(nn.Module):
    """A decoder-only transformer: ``layers`` is [Embedding, num_layers Blocks, FinalNorm, Head].

    Where attention is not causal it is an encoder, like BERT, of the same parts.

    Each layer maps one tensor to one tensor, so that a pipeline can cut the list anywhere.
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.config = config
        self.tensor = factory.tensor
        *plans, head = layer_plans(config, factory)
        layers = [plan.build() for plan in plans]
        self.layers = nn.ModuleList([*layers, head.build(layers[0])])

    def forward(
        self, tokens: torch.Tensor, cache: KVCache | None = None, places: Places | None = None
    ) -> torch.Tensor:
        """``tokens [b, s]`` int64 → logits [b, s, padded vocabulary] in the parameters' dtype.

        Of the vocabulary each tensor rank gets its range. With a ``cache`` the tokens follow those already in
        it, and are added to it. ``places`` says where they stand, unless each row is a whole sequence and one
        document.
        """
        layers = list(self.layers)
        if cache is not None:
            cache.begin(tokens.shape[1])
            logits = run_layers(layers, tokens, cache, None)
            cache.advance(tokens.shape[1])
            return logits
        if self.config.checkpoint_activations and self.training and torch.is_grad_enabled():
            return run_recomputing(layers, tokens, places, self.config.checkpoint_num_layers)
        return run_layers(layers, tokens, None, places)

    def new_cache(self, batch: int, max_length: int, starts: torch.Tensor | None = None) -> KVCache:
        """An empty :class:`KVCache` for ``batch`` rows of up to ``max_length`` tokens.

        Raises:
            ConfigError: the model sees what follows, and so cannot continue a text.
        """
        weight, config = self.layers[0].weight, self.config
        if not config.causal:
            raise ConfigError(
                "this model was trained to find hidden tokens (mlm_training), from both sides, and cannot "
                "write: to continue texts, train one without mlm_training (finetune begins with its weights)"
            )
        assert isinstance(weight, torch.Tensor)
        kv_heads = max(1, config.num_kv_heads // self.tensor.size)
        return KVCache(
            config.num_layers, batch, kv_heads, max_length, config.head_size,
            weight.dtype, weight.device, starts,
        )  # fmt: skip


def build_gpt(config: Config, factory: ParameterFactory) -> GPT:
    """The model that ``config`` describes, its parameters made by ``factory``.

    Raises:
        ConfigError: the attention back end that was asked for cannot run in the factory's dtype, on its
            device or with such heads.
    """
    if factory.device.type != "meta":
        name, head_size = config.model.attention_backend, config.model.head_size
        choose_kernel(name, factory.device, factory.dtype, head_size)
    return GPT(config.model, factory)
