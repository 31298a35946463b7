"""The logits are those of transformers' own models, where these need a key of ours that others do not.

And the same in generation, by a cache.
"""

from __future__ import annotations

import torch
from small_models import VOCABULARY, small_gpt
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
from transformers_models import assert_same_logits, check_llama_like, renamed, scattered, stacked_heads


def test_qwen2() -> None:
    """Queries, keys and values have biases, the output projection has none."""
    biases = {"use_bias_in_attn_linear": True, "use_bias_in_attn_output": False}
    check_llama_like(Qwen2ForCausalLM, Qwen2Config, 2, {}, **biases)


def test_qwen3() -> None:
    """Heads of 24 in a model of 64 channels with four heads; queries and keys are normalised."""
    check_llama_like(
        Qwen3ForCausalLM, Qwen3Config, 2, {"head_dim": 24}, kv_channels=24, use_qk_layernorm=True
    )


def test_olmo() -> None:
    """Norms without weights."""
    check_llama_like(OlmoForCausalLM, OlmoConfig, 4, {}, norm="non_parametric_layernorm")


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
    state = scattered(theirs, "transformer.")
    names = {
        "embed_in": "wte",
        "embed_pos": "wpe",
        "final_layer_norm": "ln_f",
        "layers.{}.input_layernorm": "h.{}.ln_1",
        "layers.{}.post_attention_layernorm": "h.{}.ln_2",
        "layers.{}.attention.dense": "h.{}.attn.attention.out_proj",
        "layers.{}.mlp.dense_h_to_4h": "h.{}.mlp.c_fc",
        "layers.{}.mlp.dense_4h_to_h": "h.{}.mlp.c_proj",
    }
    weights = renamed(state, names) | stacked_heads(state, "h.{}.attn.attention.{}_proj", 4)
    ours = small_gpt(
        pos_emb="learned",
        activation="gelu_tanh",
        attention_scale=1.0,
        use_bias_in_qkv=False,
        attention_config=[[["global", "local"], "all"]],
        sliding_window_width=5,
        no_weight_tying=False,
    )
    assert_same_logits(theirs, ours, weights)


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
    state = scattered(theirs, "model.decoder.")
    names = {
        "embed_in": "embed_tokens",
        "embed_pos": "embed_positions",
        "final_layer_norm": "final_layer_norm",
        "layers.{}.input_layernorm": "layers.{}.self_attn_layer_norm",
        "layers.{}.post_attention_layernorm": "layers.{}.final_layer_norm",
        "layers.{}.attention.dense": "layers.{}.self_attn.out_proj",
        "layers.{}.mlp.dense_h_to_4h": "layers.{}.fc1",
        "layers.{}.mlp.dense_4h_to_h": "layers.{}.fc2",
    }
    weights = renamed(state, names) | stacked_heads(state, "layers.{}.self_attn.{}_proj", 4)
    ours = small_gpt(pos_emb="learned", activation="relu", opt_pos_emb_offset=2, no_weight_tying=False)
    assert_same_logits(theirs, ours, weights)


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
    state = scattered(theirs, "transformer.")
    with torch.no_grad():
        state.pop("lm_head.bias").zero_()  # our head has none
    turned = torch.arange(8).view(4, 2).T.flatten()  # 0 2 4 6 1 3 5 7
    order = torch.cat([turned, torch.arange(8, 16)])
    for name in [f"h.{layer}.attn.{each}_proj.weight" for layer in range(2) for each in "qk"]:
        state[name] = state[name].view(4, 16, 64)[:, order].flatten(0, 1)
    names = {
        "embed_in": "wte",
        "embed_out": "lm_head",
        "final_layer_norm": "ln_f",
        "layers.{}.input_layernorm": "h.{}.ln_1",
        "layers.{}.attention.dense": "h.{}.attn.out_proj",
        "layers.{}.mlp.dense_h_to_4h": "h.{}.mlp.fc_in",
        "layers.{}.mlp.dense_4h_to_h": "h.{}.mlp.fc_out",
    }
    ours = small_gpt(
        pos_emb="rotary",
        rotary_pct=0.5,
        gpt_j_residual=True,
        gpt_j_tied=True,
        activation="gelu_tanh",
        use_bias_in_attn_linear=False,
        no_weight_tying=True,
    )
    weights = renamed(state, names) | stacked_heads(state, "h.{}.attn.{}_proj", 4)
    assert_same_logits(theirs, ours, weights)
