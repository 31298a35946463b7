"""The logits are those of the same weights in Hugging Face transformers' own models."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCABULARY, small_gpt
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
from transformers_models import (
    KINDS,
    assert_same_logits,
    check_llama_like,
    copy_and_compare,
    renamed,
    scattered,
    stacked_heads,
)


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
    weights = scattered(theirs, "gpt_neox.")
    if not tied:
        weights["embed_out.weight"] = weights.pop("lm_head.weight")
    keys = {} if causal else {"mlm_training": True, "mlm_mask_id": 0}
    ours = small_gpt(
        pos_emb="rotary", rotary_pct=0.25, gpt_j_residual=parallel, no_weight_tying=not tied, **keys
    )
    if causal:
        assert_same_logits(theirs, ours, weights)
    else:
        copy_and_compare(theirs, ours, weights, torch.zeros(2, 1, 24, 24))


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, None), (4, None), (2, 3)])
def test_llama_and_mistral(kv_heads: int, window: int | None) -> None:
    model, config = (LlamaForCausalLM, LlamaConfig) if window is None else (MistralForCausalLM, MistralConfig)
    fields = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    fields |= {} if window is None else {"sliding_window": window}
    keys = {"rotary_emb_base": 500000, "sliding_window_width": window}
    check_llama_like(model, config, kv_heads, fields, **keys)


def test_gpt2() -> None:
    """Their matrices are transposed; rows are all heads' q, all heads' k, all heads' v."""
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
    state = scattered(theirs, "transformer.")
    state |= {name: value.T for name, value in state.items() if name.startswith("h.") and value.dim() == 2}
    for layer in range(2):
        for kind in KINDS:
            parts = state[f"h.{layer}.attn.c_attn.{kind}"].chunk(3)
            state |= {f"h.{layer}.attn.{each}.{kind}": part for each, part in zip("qkv", parts, strict=True)}
    names = {
        "embed_in": "wte",
        "embed_pos": "wpe",
        "final_layer_norm": "ln_f",
        "layers.{}.input_layernorm": "h.{}.ln_1",
        "layers.{}.post_attention_layernorm": "h.{}.ln_2",
        "layers.{}.attention.dense": "h.{}.attn.c_proj",
        "layers.{}.mlp.dense_h_to_4h": "h.{}.mlp.c_fc",
        "layers.{}.mlp.dense_4h_to_h": "h.{}.mlp.c_proj",
    }
    ours = small_gpt(pos_emb="learned", activation="gelu_tanh", no_weight_tying=False)
    assert_same_logits(theirs, ours, renamed(state, names) | stacked_heads(state, "h.{}.attn.{}", 4))
