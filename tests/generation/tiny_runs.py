"""Checkpoints of tiny models with a byte tokenizer, for the tests of what comes out of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

from megatron_lite.config import Config, config_from_keys
from megatron_lite.model import GPT, build_gpt
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.parallel.parameter import ParameterFactory, spec_of

NEOX: dict[str, Any] = {
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
}
"""GPT-NeoX-20B's choices."""


def tiny_config(**keys: Any) -> Config:
    """Two layers of width 32, four heads, 257 tokens (bytes) padded to 272, context 48; ``keys`` override."""
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 48}
    words = {"tokenizer_type": "ByteTokenizer", "vocab_size": 257, "make_vocab_size_divisible_by": 16}
    return config_from_keys(shape | words | {"train_iters": 1} | keys, world_size=1)


@torch.no_grad()
def tiny_gpt(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A model whose every parameter, norms and biases too, is random enough to leave no mistake unseen."""
    gpt = build_gpt(config, ParameterFactory(seed, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        mean = 1.0 if parameter.dim() == 1 and spec_of(parameter).name.endswith("weight") else 0.0
        parameter.normal_(mean, 0.2, generator=generator)
    return gpt


def named_tensors(gpt: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights as a checkpoint would give them."""
    for parameter in gpt.parameters():
        yield spec_of(parameter).name, parameter.detach().float().clone()


def make_checkpoint(folder: Path, **keys: Any) -> Config:
    """Save :func:`tiny_gpt` as a run would, at steps 0 and 7 (with other weights), into ``folder``."""
    run_ranks(_save, 1, folder, keys)
    return tiny_config(**keys)


def _save(folder: Path, keys: dict[str, Any]) -> None:
    from megatron_lite.checkpoint import save_checkpoint
    from megatron_lite.training.distributed import distributed
    from megatron_lite.training.engine import Engine
    from megatron_lite.training.objectives import OBJECTIVES

    context, config = context_from_environment(), tiny_config(**keys)
    with distributed(context):
        for step in (0, 7):
            model = tiny_gpt(config, step)
            engine = Engine(
                config, context, lambda dtype, model=model: model.to(dtype), OBJECTIVES["causal_lm"]
            )
            save_checkpoint(folder, step, engine.deepspeed, {"step": step}, config.flat(), context)
