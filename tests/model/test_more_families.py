"""The logits are those of transformers' own models, where these need a key of ours that others do not.

And the same in generation, by a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from small_models import VOCABULARY, random_tokens, scatter_weights, small_gpt
from test_against_transformers import State, assert_same_logits, llama_weights
from transformers import GPTNeoConfig, GPTNeoForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_lite.model import GPT

LLAMA_LIKE: dict[str, Any] = {
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-6,
    "activation": "swiglu",
    "intermediate_size": 3 * 96,
    "no_weight_tying": True,
    "use_bias_in_mlp": False,
}
BOTH = ("weight", "bias")


def assert_same_by_cache(gpt: GPT) -> None:
    """The prompt in two pieces, then token by token: the logits of reading all at once."""
    tokens, cache = random_tokens(2, 24), gpt.new_cache(2, 24)
    pieces = [tokens[:, :7], tokens[:, 7:21], *tokens[:, 21:].split(1, 1)]
    with torch.no_grad():
        found = torch.cat([gpt(piece, cache) for piece in pieces], 1)
        torch.testing.assert_close(found, gpt(tokens), rtol=0, atol=2e-5)


def stacked(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Rows of q, k and v in our order: for each key head its query heads, the key head, the value head."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def test_qwen2() -> None:
    """Queries, keys and values have biases, the output projection has none."""
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            tie_word_embeddings=False,
        )
    )
    scatter_weights(theirs)
    state = dict(theirs.named_parameters())
    weights = llama_weights(state, 2)
    for layer in range(2):
        biases = [state[f"model.layers.{layer}.self_attn.{each}_proj.bias"] for each in "qkv"]
        weights[f"layers.{layer}.attention.query_key_value.bias"] = stacked(biases, 2)
    ours = small_gpt(num_kv_heads=2, use_bias_in_attn_output=False, **LLAMA_LIKE)
    assert_same_logits(theirs, ours, weights)
    assert_same_by_cache(ours)


def gpt_neo_weights(state: State) -> State:
    """GPT-Neo's three projections, stacked."""
    weights = {"embed_in.weight": state["wte.weight"], "embed_pos.weight": state["wpe.weight"]}
    names = {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "attention.dense": "attn.attention.out_proj",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    for kind in BOTH:
        weights[f"final_layer_norm.{kind}"] = state[f"ln_f.{kind}"]
        for layer in range(2):
            for ours, theirs in names.items():
                weights[f"layers.{layer}.{ours}.{kind}"] = state[f"h.{layer}.{theirs}.{kind}"]
    for layer in range(2):
        parts = [state[f"h.{layer}.attn.attention.{each}_proj.weight"] for each in "qkv"]
        weights[f"layers.{layer}.attention.query_key_value.weight"] = stacked(parts, 4)
    return weights


def test_gpt_neo() -> None:
    """Scores are not divided; the output projection alone has a bias; every other layer has a window."""
    theirs = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=32,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    scatter_weights(theirs)
    state = {name.removeprefix("transformer."): value for name, value in theirs.named_parameters()}
    ours = small_gpt(
        pos_emb="learned",
        activation="gelu_tanh",
        attention_scale=1.0,
        use_bias_in_qkv=False,
        attention_config=[[["global", "local"], "all"]],
        sliding_window_width=5,
        no_weight_tying=False,
    )
    assert_same_logits(theirs, ours, gpt_neo_weights(state))
    assert_same_by_cache(ours)
