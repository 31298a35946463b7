"""The logits are those of transformers' own models, where these need a key of ours that others do not.

And the same in generation, by a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from small_models import VOCABULARY, random_tokens, scatter_weights, small_gpt
from test_against_transformers import State, assert_same_logits, llama_weights
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
NORMS_OF_A_LAYER = ("input", "post_attention")


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


def test_qwen3() -> None:
    """Heads of 24 in a model of 64 channels with four heads; queries and keys are normalised."""
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=96,
            tie_word_embeddings=False,
        )
    )
    scatter_weights(theirs)
    state = dict(theirs.named_parameters())
    weights = llama_weights(state, 2)
    for layer in range(2):
        for norm in ("q_norm", "k_norm"):
            theirs_norm = state[f"model.layers.{layer}.self_attn.{norm}.weight"]
            weights[f"layers.{layer}.attention.{norm}.weight"] = theirs_norm
    ours = small_gpt(
        num_kv_heads=2, kv_channels=24, use_qk_layernorm=True, use_bias_in_attn_linear=False, **LLAMA_LIKE
    )
    assert_same_logits(theirs, ours, weights)
    assert_same_by_cache(ours)


def test_olmo() -> None:
    """Norms without weights."""
    theirs = OlmoForCausalLM(
        OlmoConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=96,
            tie_word_embeddings=False,
        )
    )
    scatter_weights(theirs)
    names = ("model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in NORMS_OF_A_LAYER))
    missing = {f"{name}.weight": torch.empty(0) for name in names}
    weights = llama_weights(dict(theirs.named_parameters()) | missing, 4)
    weights = {name: weight for name, weight in weights.items() if weight.numel()}
    keys = {**LLAMA_LIKE, "norm": "non_parametric_layernorm", "use_bias_in_attn_linear": False}
    ours = small_gpt(**keys)
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


def test_opt() -> None:
    """Learned positions begin at row 2 of the table."""
    theirs = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=256,
            max_position_embeddings=32,
            word_embed_proj_dim=64,
        )
    )
    scatter_weights(theirs)
    state = {name.removeprefix("model.decoder."): value for name, value in theirs.named_parameters()}
    weights = {
        "embed_in.weight": state["embed_tokens.weight"],
        "embed_pos.weight": state["embed_positions.weight"],
    }
    names = {
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "attention.dense": "self_attn.out_proj",
        "mlp.dense_h_to_4h": "fc1",
        "mlp.dense_4h_to_h": "fc2",
    }
    for kind in BOTH:
        weights[f"final_layer_norm.{kind}"] = state[f"final_layer_norm.{kind}"]
        for layer in range(2):
            for ours_name, their_name in names.items():
                weights[f"layers.{layer}.{ours_name}.{kind}"] = state[f"layers.{layer}.{their_name}.{kind}"]
            parts = [state[f"layers.{layer}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            weights[f"layers.{layer}.attention.query_key_value.{kind}"] = stacked(parts, 4)
    ours = small_gpt(pos_emb="learned", activation="relu", opt_pos_emb_offset=2, no_weight_tying=False)
    assert_same_logits(theirs, ours, weights)
    assert_same_by_cache(ours)


def test_gpt_j() -> None:
    """Neighbouring channels turn together: rows of queries and keys in another order, and no key of ours."""
    theirs = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    scatter_weights(theirs)
    with torch.no_grad():
        theirs.lm_head.bias.zero_()  # our head has none
    state = {name.removeprefix("transformer."): value for name, value in theirs.named_parameters()}
    turned = torch.arange(8).view(4, 2).T.flatten()  # 0 2 4 6 1 3 5 7
    order = torch.cat([turned, torch.arange(8, 16)])
    weights = {"embed_in.weight": state["wte.weight"], "embed_out.weight": state["lm_head.weight"]}
    for kind in BOTH:
        weights[f"final_layer_norm.{kind}"] = state[f"ln_f.{kind}"]
        for layer in range(2):
            ours_name, their_name = f"layers.{layer}", f"h.{layer}"
            weights[f"{ours_name}.input_layernorm.{kind}"] = state[f"{their_name}.ln_1.{kind}"]
            weights[f"{ours_name}.mlp.dense_h_to_4h.{kind}"] = state[f"{their_name}.mlp.fc_in.{kind}"]
            weights[f"{ours_name}.mlp.dense_4h_to_h.{kind}"] = state[f"{their_name}.mlp.fc_out.{kind}"]
    for layer in range(2):
        q, k, v = (state[f"h.{layer}.attn.{each}_proj.weight"] for each in "qkv")
        parts = [each.view(4, 16, 64)[:, order].flatten(0, 1) for each in (q, k)]
        weights[f"layers.{layer}.attention.query_key_value.weight"] = stacked([*parts, v], 4)
        weights[f"layers.{layer}.attention.dense.weight"] = state[f"h.{layer}.attn.out_proj.weight"]
    ours = small_gpt(
        pos_emb="rotary",
        rotary_pct=0.5,
        gpt_j_residual=True,
        gpt_j_tied=True,
        activation="gelu_tanh",
        use_bias_in_attn_linear=False,
        no_weight_tying=True,
    )
    assert_same_logits(theirs, ours, weights)
    assert_same_by_cache(ours)
