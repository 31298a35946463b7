"""The logits are those of the same weights in Hugging Face transformers' own models."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCABULARY, by_name, random_tokens, scatter_weights, small_gpt
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from megatron_lite.model import GPT

TOLERANCE = 1e-5
BLOCK = "layers.{}."
State = dict[str, torch.Tensor]


def assert_same_logits(
    theirs: torch.nn.Module, ours: GPT, weights: State, mask: torch.Tensor | None = None
) -> None:
    """Copy ``weights`` (by our names, each of ours exactly once) and compare; ``mask`` is for theirs."""
    parameters = by_name(ours)
    assert parameters.keys() == weights.keys()
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
        expected, logits = theirs.eval()(tokens, attention_mask=mask).logits, ours.eval()(tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("parallel", "tied", "causal"),
    [
        (False, False, True),
        (False, True, True),
        (True, False, True),
        (True, True, True),
        (True, False, False),
    ],
)
def test_gpt_neox(parallel: bool, tied: bool, causal: bool) -> None:
    """Attention in both directions is theirs with a mask that hides nothing (what it adds to all scores)."""
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            rotary_pct=0.25,
            use_parallel_residual=parallel,
            tie_word_embeddings=tied,
        )
    )
    scatter_weights(theirs)
    weights = {name.removeprefix("gpt_neox."): value for name, value in theirs.named_parameters()}
    if not tied:
        weights["embed_out.weight"] = weights.pop("lm_head.weight")
    keys = {} if causal else {"mlm_training": True, "mlm_mask_id": 0}
    ours = small_gpt(
        pos_emb="rotary", rotary_pct=0.25, gpt_j_residual=parallel, no_weight_tying=not tied, **keys
    )
    assert_same_logits(theirs, ours, weights, None if causal else torch.zeros(2, 1, 24, 24))


def llama_weights(state: State, groups: int) -> State:
    """Llama's separate projections, stacked in our row order."""

    def grouped(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(groups, -1, weight.shape[-1])

    weights = {
        "embed_in.weight": state["model.embed_tokens.weight"],
        "final_layer_norm.weight": state["model.norm.weight"],
        "embed_out.weight": state["lm_head.weight"],
    }
    for layer in range(2):
        ours, theirs = BLOCK.format(layer), "model." + BLOCK.format(layer)
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            weights[ours + norm] = state[theirs + norm]
        heads = [grouped(state[f"{theirs}self_attn.{each}_proj.weight"]) for each in "qkv"]
        weights[ours + "attention.query_key_value.weight"] = torch.cat(heads, dim=1).flatten(0, 1)
        weights[ours + "attention.dense.weight"] = state[theirs + "self_attn.o_proj.weight"]
        gate_and_up = [state[f"{theirs}mlp.{each}_proj.weight"] for each in ("gate", "up")]
        weights[ours + "mlp.dense_h_to_4h.weight"] = torch.cat(gate_and_up)
        weights[ours + "mlp.dense_4h_to_h.weight"] = state[theirs + "mlp.down_proj.weight"]
    return weights


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, None), (4, None), (2, 3)])
def test_llama_and_mistral(kv_heads: int, window: int | None) -> None:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    if window is None:
        theirs = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        theirs = MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    scatter_weights(theirs)
    ours = small_gpt(
        pos_emb="rotary",
        rotary_emb_base=500000,
        norm="rmsnorm",
        rms_norm_epsilon=1e-6,
        activation="swiglu",
        intermediate_size=3 * 96,
        num_kv_heads=kv_heads,
        sliding_window_width=window,
        no_weight_tying=True,
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
    )
    assert_same_logits(theirs, ours, llama_weights(dict(theirs.named_parameters()), kv_heads))


def gpt2_weights(state: State, heads: int) -> State:
    """GPT-2's transposed matrices, rows [all heads' q; all heads' k; all heads' v], in our order."""
    weights = {"embed_in.weight": state["wte.weight"], "embed_pos.weight": state["wpe.weight"]}
    for kind in ("weight", "bias"):
        weights[f"final_layer_norm.{kind}"] = state[f"ln_f.{kind}"]
        for layer in range(2):
            ours, theirs = BLOCK.format(layer), f"h.{layer}."
            weights[f"{ours}input_layernorm.{kind}"] = state[f"{theirs}ln_1.{kind}"]
            weights[f"{ours}post_attention_layernorm.{kind}"] = state[f"{theirs}ln_2.{kind}"]
            stacked = state[f"{theirs}attn.c_attn.{kind}"].movedim(0, -1)
            per_head = stacked.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
            weights[f"{ours}attention.query_key_value.{kind}"] = per_head
            weights[f"{ours}attention.dense.{kind}"] = state[f"{theirs}attn.c_proj.{kind}"].movedim(0, -1)
            weights[f"{ours}mlp.dense_h_to_4h.{kind}"] = state[f"{theirs}mlp.c_fc.{kind}"].movedim(0, -1)
            weights[f"{ours}mlp.dense_4h_to_h.{kind}"] = state[f"{theirs}mlp.c_proj.{kind}"].movedim(0, -1)
    return weights


def test_gpt2() -> None:
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    scatter_weights(theirs)
    state = {name.removeprefix("transformer."): value for name, value in theirs.named_parameters()}
    ours = small_gpt(pos_emb="learned", activation="gelu_tanh", no_weight_tying=False)
    assert_same_logits(theirs, ours, gpt2_weights(state, heads=4))
