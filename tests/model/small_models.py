"""Small models for the tests beside this file."""

from __future__ import annotations

from typing import Any

import torch

from megatron_lite.config import Config, config_from_keys
from megatron_lite.model import GPT, build_gpt
from megatron_lite.parallel.parameter import ParameterFactory, spec_of

VOCABULARY = 128


def small_config(**keys: Any) -> Config:
    """Two layers of width 64, four heads, 128 tokens, 32 positions; ``keys`` override."""
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}
    optimizer = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    rest = {"vocab_size": VOCABULARY, "train_iters": 1, "train_micro_batch_size_per_gpu": 1}
    return config_from_keys(shape | optimizer | rest | keys, world_size=1)


def small_gpt(dtype: torch.dtype = torch.float32, seed: int = 1, **keys: Any) -> GPT:
    return build_gpt(small_config(**keys), ParameterFactory(seed, dtype))


def by_name(gpt: GPT) -> dict[str, torch.nn.Parameter]:
    return {spec_of(parameter).name: parameter for parameter in gpt.parameters()}


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def scatter_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms and biases too, values that leave no mistake in their use unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15, generator=generator)
