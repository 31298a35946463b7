"""A model divided over tensor ranks against the whole one: logits, losses, every gradient, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

from megatron_lite.config import Config, config_from_keys

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "seq_length": 16,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 8,
    "data_path": "unused",
}
SPLIT = {"sequence_parallel": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
MODELS: list[dict[str, Any]] = [
    {"pos_emb": "learned"},
    {"pos_emb": "learned", **SPLIT},
    {"pos_emb": "rotary", "num_kv_heads": 2, "use_qk_layernorm": True, "no_weight_tying": True},
    {"pos_emb": "rotary", "num_kv_heads": 1, "activation": "swiglu", "mlp_multiple_of": 8, **SPLIT},
    {"pos_emb": "rotary", "rope_scaling": YARN, "use_bias_in_attn_output": False, **SPLIT},
    {"pos_emb": "learned", "attention_scale": 1.0, "use_bias_in_qkv": False, **SPLIT},
    {"pos_emb": "rotary", "num_kv_heads": 1, "use_bias_in_attn_output": False},
    {"pos_emb": "sinusoidal", "kv_channels": 6, "norm": "scalenorm", "use_qk_layernorm": True, **SPLIT},
    {"pos_emb": "rotary", "no_weight_tying": True, "use_bias_in_head": True, **SPLIT},
    {"pos_emb": "learned", "opt_pos_emb_offset": 2, "norm": "non_parametric_layernorm", **SPLIT},
    {"pos_emb": "rotary", "gpt_j_residual": True, "use_qk_layernorm": True, "norm": "rmsnorm", **SPLIT},
    {
        "pos_emb": "rotary",
        "gpt_j_residual": True,
        "gpt_j_tied": True,
        "checkpoint_activations": True,
        **SPLIT,
    },
    {"pos_emb": "none", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "num_kv_heads": 4},
]


def make(keys: dict[str, Any], size: int) -> Config:
    return config_from_keys({**SHAPE, **keys, "model_parallel_size": size}, world_size=size)


def differences(models: list[dict[str, Any]], size: int, dtype_name: str) -> list[dict[str, float]]:
    """By parameter, the largest error of its gradient relative to the gradient's largest number."""
    import torch

    from megatron_lite.model import build_gpt, token_loss
    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.parallel.parameter import ParameterFactory, spec_of
    from megatron_lite.parallel.tensor import TensorParallel

    found = []
    dtype = getattr(torch, dtype_name)
    for keys in models:
        config = make(keys, size)
        axis = arrange(context_from_environment(), config.parallel).tensor
        tensor = TensorParallel(axis, config.parallel.sequence_parallel)
        whole = build_gpt(config, ParameterFactory(1, dtype))
        part = build_gpt(config, ParameterFactory(1, dtype, tensor=tensor))
        tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))
        labels = (tokens * 3 + 1) % 61
        logits, own_logits = whole(tokens), part(tokens)
        errors = {"logits": worst(own_logits, logits.chunk(size, -1)[axis.rank])}
        textbook = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none"
        )
        losses = token_loss(own_logits, labels, axis)
        errors["loss"] = worst(losses.flatten(), textbook)
        weights = torch.linspace(0.1, 1.0, losses.numel())
        (textbook * weights).sum().backward()
        (losses.flatten() * weights).sum().backward()
        expected = {spec_of(p).name: p.grad for p in whole.parameters()}
        for parameter in part.parameters():
            spec = spec_of(parameter)
            gradient = expected[spec.name] if spec.shard is None else spec.shard.take(expected[spec.name])
            assert parameter.shape == spec.local_shape
            error = worst(parameter.grad, gradient, scale=float(expected[spec.name].abs().max()))
            errors[spec.name] = max(errors.get(spec.name, 0.0), error)
        assert errors.keys() - {"logits", "loss"} == expected.keys()
        found.append(errors)
    return found


def worst(actual: Any, expected: Any, scale: float | None = None) -> float:
    return float((actual - expected).abs().max()) / (scale or float(expected.abs().max()))


@pytest.mark.parametrize("size", [2, 4])
def test_a_divided_model_computes_what_the_whole_one_does(size: int) -> None:
    for by_model in run_ranks(differences, size, MODELS, size, "float32"):
        for keys, errors in zip(MODELS, by_model, strict=True):
            assert max(errors.values()) < 5e-6, (keys, errors)


def test_bf16_differs_by_its_rounding() -> None:
    for by_model in run_ranks(differences, 2, MODELS[:4], 2, "bfloat16"):
        for keys, errors in zip(MODELS, by_model, strict=False):
            assert max(errors.values()) < 0.1, (keys, errors)


def dropped(sequence_parallel: bool) -> tuple[list[list[float]], list[float]]:
    """Which numbers the embedding's dropout and the attention's drop on this rank; a second draw's too."""
    import torch

    from megatron_lite.model.block import Block
    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.parallel.parameter import ParameterFactory
    from megatron_lite.parallel.tensor import TensorParallel
    from megatron_lite.training.loop import seed_dropout

    config = make({"sequence_parallel": sequence_parallel, "hidden_dropout": 0.5}, 2)
    context = arrange(context_from_environment(), config.parallel)
    tensor = TensorParallel(context.tensor, sequence_parallel)
    block = Block(config.model, 0, ParameterFactory(1, tensor=tensor)).train()
    seed_dropout(config, context, 0)
    hidden = [block.drop(torch.ones(32)).tolist() for _ in range(2)]
    with tensor.own_random_numbers(torch.device("cpu")):
        own = torch.rand(8).tolist()
    hidden.append(block.drop(torch.ones(32)).tolist())
    return hidden, own


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_is_equal_on_copies_and_differs_on_parts(sequence_parallel: bool) -> None:
    (first, first_own), (second, second_own) = run_ranks(dropped, 2, sequence_parallel)
    assert first_own != second_own
    for ours, theirs in zip(first, second, strict=True):
        assert (ours == theirs) != sequence_parallel
    assert first[0] != first[1] != first[2]
