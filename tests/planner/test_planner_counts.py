"""Parameters and operations by formula, against published figures and against models that were built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import Config, config_from_keys
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory, spec_of
from megatron_lite.planner import count_parameters, flops_per_sequence, parameters_by_place
from megatron_lite.planner.parameters import parameters_on_rank
from megatron_lite.planner.swap import largest_slice, matrices_on_rank
from megatron_lite.training.shares import modules_by_rank


def gpt2(layers: int, hidden: int, heads: int, biases: bool = True) -> Config:
    return config_from_keys(
        {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "seq_length": 1024,
            "pos_emb": "learned",
            "vocab_size": 50257,
            "make_vocab_size_divisible_by": 1,
            "use_bias_in_norms": biases,
            "use_bias_in_attn_linear": biases,
            "use_bias_in_mlp": biases,
        }
    )


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ((12, 768, 12), 124_439_808),
        ((24, 1024, 16), 354_823_168),
        ((36, 1280, 20), 774_030_080),
        ((48, 1600, 25), 1_557_611_200),
        ((12, 768, 12, False), 124_337_664),
    ],
)
def test_gpt2_sizes(shape: tuple[Any, ...], parameters: int) -> None:
    assert count_parameters(gpt2(*shape)) == parameters


def test_flops_of_gpt2() -> None:
    assert flops_per_sequence(gpt2(12, 768, 12, biases=False)) == 875_062_886_400


def test_flops_of_a_window_in_both_directions() -> None:
    """A token sees as many tokens again behind it; where all are seen, no more than there are."""
    causal = gpt2(12, 768, 12).with_keys(sliding_window_width=128)
    both = causal.with_keys(mlm_training=True, mlm_mask_id=0)
    assert flops_per_sequence(both) - flops_per_sequence(causal) == 12 * 12 * 768 * 127 * 1024
    assert flops_per_sequence(both.with_keys(sliding_window_width=600)) == flops_per_sequence(
        gpt2(12, 768, 12)
    )


def test_flops_of_wider_heads() -> None:
    """Twice the width: twice the projections of a layer, and twice the work on scores and values."""
    plain = gpt2(12, 768, 12, biases=False)
    wide = plain.with_keys(kv_channels=128)
    projections, scores = 4 * 768 * 768, 12 * 768 * 1024
    assert flops_per_sequence(wide) - flops_per_sequence(plain) == 12 * (6 * projections + scores) * 1024


def test_untying_the_head_costs_memory_but_no_operations() -> None:
    tied = gpt2(12, 768, 12)
    untied = tied.with_keys(no_weight_tying=True)
    assert count_parameters(untied) - count_parameters(tied) == 50257 * 768
    assert flops_per_sequence(untied) == flops_per_sequence(tied)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, queries_per_key = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * queries_per_key
    sizes = {
        "num_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": heads * 2 * draw(st.integers(1, 5)),
        "kv_channels": draw(st.sampled_from([None, 6])),
        "seq_length": draw(st.integers(1, 16)),
        "max_position_embeddings": 16,
        "vocab_size": draw(st.integers(1, 300)),
        "make_vocab_size_divisible_by": draw(st.sampled_from([1, 8, 128])),
        "mlp_multiple_of": draw(st.sampled_from([1, 8])),
        "pos_emb": draw(st.sampled_from(["rotary", "learned", "sinusoidal", "none"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"])),
        "activation": draw(st.sampled_from(["gelu", "swiglu", "bilinear"])),
        "moe_num_experts": draw(st.sampled_from([1, 3])),
        "moe_top_k": 1,
        "expert_interval": draw(st.sampled_from([1, 2])),
    }
    names = (
        "no_weight_tying use_bias_in_norms use_bias_in_qkv use_bias_in_attn_output use_bias_in_mlp "
        "use_qk_layernorm gpt_j_residual gpt_j_tied"
    )
    sizes["opt_pos_emb_offset"] = draw(st.sampled_from([0, 2])) if sizes["pos_emb"] == "learned" else 0
    switches = {name: draw(st.booleans()) for name in names.split()}
    return sizes | switches | {"use_bias_in_head": switches["no_weight_tying"] and draw(st.booleans())}


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_count_is_that_of_the_built_model(keys: dict[str, Any]) -> None:
    config = config_from_keys(keys)
    gpt = build_gpt(config, ParameterFactory(1, device=torch.device("meta")))
    assert count_parameters(config) == sum(parameter.numel() for parameter in gpt.parameters())
    places = parameters_by_place(config)
    for block, kind in zip(gpt.layers[1:], config.model.mlp_kinds, strict=False):
        counted = places.layer if kind == "dense" else places.mixture + places.experts * places.expert
        assert counted == sum(parameter.numel() for parameter in block.parameters())


def test_a_token_meets_few_experts() -> None:
    """Mixtral 8x7B (arXiv 2401.04088): 47B parameters, of which a token uses 13B."""
    keys = {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_kv_heads": 8,
        "seq_length": 4096, "vocab_size": 32000, "pos_emb": "rotary", "norm": "rmsnorm",
        "activation": "swiglu", "intermediate_size": 3 * 14336, "no_weight_tying": True,
        "use_bias_in_attn_linear": False, "use_bias_in_mlp": False,
        "moe_num_experts": 8, "moe_top_k": 2, "expert_interval": 1,
    }  # fmt: skip
    count = parameters_by_place(config_from_keys(keys))
    assert count.total == 46_702_792_704
    assert count.active == pytest.approx(12.9e9, rel=0.005)
    one = parameters_by_place(config_from_keys({**keys, "moe_num_experts": 1}))
    assert count.in_matmuls - one.in_matmuls == 32 * (count.expert + 8 * 4096), (
        "a second expert and the router"
    )
    more, fewer = (flops_per_sequence(config_from_keys({**keys, "moe_num_experts": n})) for n in (8, 4))
    assert more - fewer == 6 * 32 * (8 - 4) * 4096 * 4096, "experts that no token chooses cost their scores"


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"model_parallel_size": 2}),
    (4, {"model_parallel_size": 4}),  # two ranks share each of the two key heads
    (4, {"model_parallel_size": 2, "expert_parallel_size": 2}),
    (4, {"expert_parallel_size": 4}),
    (4, {"pipe_parallel_size": 2, "expert_parallel_size": 2}),
    (4, {"pipe_parallel_size": 2, "model_parallel_size": 2}),
]


@pytest.mark.parametrize(("ranks", "degrees"), LAYOUTS, ids=str)
def test_what_a_rank_has_is_what_is_built_there(ranks: int, degrees: dict[str, int]) -> None:
    """Of models with experts and without; of the stages the one that has most."""
    for model in (
        {"moe_num_experts": 4, "moe_top_k": 2, "activation": "swiglu", "pos_emb": "rotary"},
        {"moe_num_experts": 4, "expert_interval": 1, "use_qk_layernorm": True, "norm": "rmsnorm"},
        {"pos_emb": "learned", "no_weight_tying": True, "gpt_j_residual": True},
        {"kv_channels": 24, "norm": "scalenorm", "use_qk_layernorm": True, "use_bias_in_qkv": False},
        {"pos_emb": "learned", "opt_pos_emb_offset": 2, "norm": "non_parametric_layernorm"},
        {"no_weight_tying": True, "use_bias_in_head": True},
    ):
        keys = {
            "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2, "seq_length": 8,
            "vocab_size": 100, "mlp_multiple_of": 8, "no_weight_tying": False, "pos_emb": "rotary",
            "tokenizer_type": "ByteTokenizer", **model, **degrees,
        }  # fmt: skip
        if "moe_num_experts" not in keys:
            keys.pop("expert_parallel_size", None)
        config = config_from_keys(keys, world_size=ranks)
        built = [list(module.parameters()) for module in modules_by_rank(config)]
        counted = parameters_on_rank(config)
        largest = max(sum(parameter.numel() for parameter in parameters) for parameters in built)
        if config.parallel.pipe_parallel_size > 1:  # a stage with an end, and without the other
            assert largest <= counted.total <= largest + counted.final_norm + counted.position_embedding
            continue
        assert counted.total == largest
        matrices = [parameter.numel() for parameter in built[0] if spec_of(parameter).decays]
        assert list(matrices_on_rank(config)) == matrices
        replicas = config.parallel.replicas
        sharing = {True: replicas // config.parallel.expert_parallel_size, False: replicas}
        slices = [-(-p.numel() // sharing[spec_of(p).is_expert]) for p in built[0] if spec_of(p).decays]
        assert largest_slice(config) == max(slices)
