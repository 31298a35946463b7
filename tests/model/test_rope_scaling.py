"""``rope_scaling`` against transformers' own functions and models, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import by_name, random_tokens, small_config, small_gpt
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers_models import check_llama_like

from megatron_lite.model.frequencies import ROPE_TYPES, Rope, frequencies
from megatron_lite.utils.errors import ConfigError

CPU = torch.device("cpu")
FACTORS = {"short_factor": [1.0 + 0.01 * i for i in range(16)], "long_factor": [1.0 + i for i in range(16)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[tuple[int, dict[str, Any]]] = [
    (512, {"rope_type": "linear", "factor": 4.0}),
    (512, {"rope_type": "dynamic", "factor": 2.0}),
    (4096, LLAMA3 | {"original_max_position_embeddings": 512}),
    (4096, LLAMA3 | {"original_max_position_embeddings": 100, "high_freq_factor": 1.5}),
    (4096, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}),
    (
        4096,
        {
            "rope_type": "yarn",
            "factor": 3.5,
            "original_max_position_embeddings": 1000,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
            "attention_factor": 1.5,
        },
    ),
    (
        4096,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    ),
    (512, {"rope_type": "longrope", "original_max_position_embeddings": 512, "factor": 4.0, **FACTORS}),
    (4096, {"rope_type": "longrope", "original_max_position_embeddings": 512, **FACTORS}),
    (
        4096,
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 512,
            "attention_factor": 1.2,
            **FACTORS,
        },
    ),
]
WIDE = {"num_attention_heads": 1, "hidden_size": 64, "pos_emb": "rotary", "rotary_pct": 0.5}


def test_every_type_is_tested() -> None:
    assert {scaling["rope_type"] for _, scaling in SCALINGS} == ROPE_TYPES.keys() - {"default"}


@pytest.mark.parametrize(("length", "scaling"), SCALINGS, ids=str)
def test_frequencies_are_those_of_transformers(length: int, scaling: dict[str, Any]) -> None:
    """Half of 64 channels rotate; sequences are as long as the model allows."""
    rotary = {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    theirs = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=length,
        rope_parameters={**scaling, **rotary},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, CPU, seq_len=length)
    ours = small_config(**WIDE, rotary_emb_base=5000, seq_length=length, rope_scaling=scaling).model
    found, our_factor = frequencies(Rope.of(ours), CPU)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


SHORT = {"original_max_position_embeddings": 8}
MODELS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    LLAMA3 | SHORT,
    {"rope_type": "yarn", "factor": 4.0, **SHORT},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        **SHORT,
    },
]


@pytest.mark.parametrize("scaling", MODELS, ids=lambda scaling: scaling["rope_type"])
def test_logits_and_generation(scaling: dict[str, Any]) -> None:
    """Those of transformers' Llama, beyond the original length; then the same by a cache, in pieces."""
    fields = {"max_position_embeddings": 32, "rope_parameters": {**scaling, "rope_theta": 10000.0}}
    check_llama_like(LlamaForCausalLM, LlamaConfig, 2, fields, rope_scaling=scaling)


def test_turned_heads_are_scaled_in_the_gradient_too() -> None:
    """The attention factor multiplies queries and keys: twice the factor is like four times the scores."""
    scaling = {"rope_type": "yarn", "factor": 4.0, **SHORT}
    gradients = []
    for factor, times in ((2.0, 1.0), (1.0, 2.0)):
        scaled = {**scaling, "attention_factor": factor}
        gpt = small_gpt(num_layers=1, pos_emb="rotary", rope_scaling=scaled)
        weight = by_name(gpt)["layers.0.attention.query_key_value.weight"]
        with torch.no_grad():
            weight.view(4, 3, 16, 64)[:, :2] *= times
        gpt(random_tokens(2, 24)).square().sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad.view(4, 3, 16, 64)[:, :2] * times)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"rope_type": "llama3", "factor": 8.0, **SHORT}, "needs low_freq_factor and high_freq_factor too"),
        ({"rope_type": "linear"}, "needs factor too"),
        ({"rope_type": "linear", "factor": 0.5}, "factor should be greater than or equal to 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "does not read beta_fast: leave it out"),
        ({"factor": 2.0}, "rope_type default does not read factor"),
        (LLAMA3 | SHORT | {"low_freq_factor": 4}, "low_freq_factor 4 must be less than high_freq_factor 4"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 33, **SHORT}, "less than beta_fast 32"),
        ({"rope_type": "ntk", "factor": 2.0}, "rope_scaling.rope_type should be 'default', "),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "type is 'linear': keep one"),
        ({"rope_type": "linear", "factr": 2.0}, "did you mean factor?"),
        ({"rope_theta": 1e6}, "write rotary_emb_base outside of rope_scaling"),
        (
            {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1] * 8, **SHORT},
            "short_factor has 2 numbers, but a head has 8 pairs",
        ),
        ({"rope_type": "longrope", "short_factor": [0.0], "long_factor": [1.0], **SHORT}, "short_factor.0 "),
    ],
)
def test_what_is_refused(scaling: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(pos_emb="rotary", rope_scaling=scaling)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_belongs_to_rotary_positions() -> None:
    with pytest.raises(ConfigError, match="pos_emb is learned: set pos_emb: rotary, or leave rope_scaling"):
        small_config(pos_emb="learned", rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_older_name_null_and_a_way_back() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    config = small_config(pos_emb="rotary", rope_scaling={"type": "linear", "factor": 2.0})
    assert config == small_config(pos_emb="rotary", rope_scaling=linear)
    assert config.with_keys(rope_scaling=None) == small_config(pos_emb="rotary")
    assert small_config(**config.flat()) == config


def test_dynamic_beyond_its_length_names_the_base() -> None:
    """What it comes to there is what transformers computes for sequences of that length."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    keys = {**WIDE, "max_position_embeddings": 512, "seq_length": 2048}
    with pytest.raises(ConfigError, match="rotary_emb_base") as caught:
        small_config(**keys, rope_scaling=scaling)
    base = int(str(caught.value).split("rotary_emb_base: ")[1].split()[0])
    ours = small_config(**WIDE, seq_length=2048, rotary_emb_base=base).model
    theirs = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=512,
        rope_parameters={**scaling, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, CPU, seq_len=2048)
    torch.testing.assert_close(frequencies(Rope.of(ours), CPU)[0], expected, rtol=1e-4, atol=0)
