"""Weights begin as the formulas say, the same wherever and however the model is built."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import by_name, small_config, small_gpt

from megatron_lite.model import build_gpt
from megatron_lite.model.initialize import INIT_METHODS
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.planner import count_parameters

LAYERS, HIDDEN, STD = 2, 64, 0.03
EXPECTED_STD = {
    "normal": STD,
    "scaled_normal": STD / math.sqrt(2 * LAYERS),
    "single_residual_scaled_normal": STD / math.sqrt(LAYERS),
    "small_init": math.sqrt(2 / (5 * HIDDEN)),
    "wang_init": 2 / (LAYERS * math.sqrt(HIDDEN)),
    "xavier_uniform": math.sqrt(2 / (256 + HIDDEN)),
    "xavier_normal": math.sqrt(2 / (256 + HIDDEN)),
}


def draw(method: str, shape: tuple[int, ...]) -> torch.Tensor:
    config = small_config(num_layers=LAYERS, hidden_size=HIDDEN, init_method_std=STD).model
    return ParameterFactory(7).make("w", shape, INIT_METHODS[method](config)).detach()


@pytest.mark.parametrize("method", EXPECTED_STD)
def test_standard_deviation(method: str) -> None:
    value = draw(method, (256, HIDDEN))
    expected = EXPECTED_STD[method]
    error_of_estimate = expected / math.sqrt(2 * value.numel())
    assert abs(value.std().item() - expected) < 5 * error_of_estimate
    assert abs(value.mean().item()) < 5 * expected / math.sqrt(value.numel())


@pytest.mark.parametrize(
    ("method", "scale"), [("orthogonal", 1.0), ("scaled_orthogonal", 1 / math.sqrt(LAYERS))]
)
def test_orthogonal(method: str, scale: float) -> None:
    value = draw(method, (256, HIDDEN))
    torch.testing.assert_close(value.T @ value, scale**2 * torch.eye(HIDDEN), rtol=0, atol=1e-5)


def test_every_method_is_tested() -> None:
    assert set(INIT_METHODS) == set(EXPECTED_STD) | {"orthogonal", "scaled_orthogonal"}


def test_each_layer_gets_its_own_method() -> None:
    gpt = small_gpt(
        hidden_size=256,
        init_method="small_init",
        output_layer_init_method="wang_init",
        no_weight_tying=True,
        pos_emb="rotary",
    )
    small, wang = math.sqrt(2 / (5 * 256)), 2 / (2 * math.sqrt(256))
    for name, parameter in by_name(gpt).items():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0))
            continue
        writes_residual = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
        expected = wang if writes_residual else small
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name


def test_same_weights_in_every_dtype() -> None:
    whole = by_name(small_gpt(torch.float32))
    half = by_name(small_gpt(torch.bfloat16))
    for name, parameter in half.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, whole[name].bfloat16()), name


def test_same_weights_whatever_is_built_before() -> None:
    two, four = by_name(small_gpt()), by_name(small_gpt(num_layers=4, init_method="small_init"))
    four_alike = by_name(small_gpt(num_layers=4))
    torch.manual_seed(99)
    again = by_name(small_gpt())
    assert all(torch.equal(two[name], again[name]) for name in two)
    shared = "layers.1.mlp.dense_h_to_4h.weight"
    assert torch.equal(two[shared], four_alike[shared])
    assert not torch.equal(two[shared], four[shared])
    assert not torch.equal(two[shared], by_name(small_gpt(seed=2))[shared])
    assert not torch.equal(two[shared], two["layers.0.mlp.dense_h_to_4h.weight"])


def test_same_weights_within_zero_init() -> None:
    """DeepSpeed's zero.Init changes what torch.empty makes: the draw must not notice."""
    partition = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")
    whole = by_name(small_gpt())
    original = torch.empty
    wrapper = partition.zero_wrapper_for_fp_tensor_constructor
    torch.empty = wrapper(original, torch.bfloat16, torch.device("cpu"))
    try:
        inside = by_name(small_gpt(torch.bfloat16, init_method="normal"))
    finally:
        torch.empty = original
    assert all(torch.equal(inside[name], whole[name].bfloat16()) for name in whole)


GPT2_SIZES = [
    (12, 768, 12, True, 124_439_808),
    (24, 1024, 16, True, 354_823_168),
    (36, 1280, 20, True, 774_030_080),
    (48, 1600, 25, True, 1_557_611_200),
    (12, 768, 12, False, 124_337_664),
]


@pytest.mark.parametrize(("layers", "hidden", "heads", "biases", "expected"), GPT2_SIZES)
def test_gpt2_parameter_counts(layers: int, hidden: int, heads: int, biases: bool, expected: int) -> None:
    """The published sizes of GPT-2, counted on the meta device: no memory, no drawing."""
    config = small_config(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        seq_length=1024,
        pos_emb="learned",
        no_weight_tying=False,
        vocab_size=50257,
        make_vocab_size_divisible_by=1,
        use_bias_in_norms=biases,
        use_bias_in_attn_linear=biases,
        use_bias_in_mlp=biases,
    )
    gpt = build_gpt(config, ParameterFactory(1, device=torch.device("meta")))
    assert sum(parameter.numel() for parameter in gpt.parameters()) == expected


VARIANTS: list[dict[str, Any]] = [
    {"pos_emb": "learned", "no_weight_tying": True},
    {"pos_emb": "rotary", "num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"},
    {"pos_emb": "none", "gpt_j_residual": True, "gpt_j_tied": True, "use_bias_in_mlp": False},
    {"pos_emb": "rotary", "gpt_j_residual": True, "use_qk_layernorm": True},
]


@pytest.mark.parametrize("keys", VARIANTS)
def test_planner_counts_what_is_built(keys: dict[str, Any]) -> None:
    config = small_config(**keys)
    gpt = build_gpt(config, ParameterFactory(1, device=torch.device("meta")))
    assert sum(parameter.numel() for parameter in gpt.parameters()) == count_parameters(config)


def test_tied_head_is_the_embedding() -> None:
    tied, untied = small_gpt(no_weight_tying=False), small_gpt(no_weight_tying=True)
    assert tied.layers[0].weight is tied.layers[-1].weight
    assert "embed_out.weight" not in by_name(tied)
    assert by_name(untied)["embed_out.weight"] is untied.layers[-1].weight
