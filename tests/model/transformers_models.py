"""The models of Hugging Face transformers as a reference: their weights by our names, and the comparison."""

from __future__ import annotations

from typing import Any

import torch
from small_models import VOCABULARY, by_name, random_tokens, scatter_weights, small_gpt

from megatron_lite.model import GPT

TOLERANCE = 1e-5
KINDS = ("weight", "bias")
LLAMA = {
    "embed_in": "model.embed_tokens",
    "embed_out": "lm_head",
    "final_layer_norm": "model.norm",
    "layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
    "layers.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.attention.dense": "model.layers.{}.self_attn.o_proj",
    "layers.{}.mlp.dense_4h_to_h": "model.layers.{}.mlp.down_proj",
}
"""Our module → theirs, in Llama and its kin."""

State = dict[str, torch.Tensor]


def scattered(theirs: torch.nn.Module, prefix: str = "") -> State:
    """Their parameters, with other values than the initial ones, by their names without ``prefix``."""
    scatter_weights(theirs)
    return {name.removeprefix(prefix): value for name, value in theirs.named_parameters()}


def renamed(state: State, names: dict[str, str]) -> State:
    """What their modules have of weights and biases, by our names; ``{}`` is the number of the layer."""
    return {
        f"{ours.format(layer)}.{kind}": state[f"{theirs.format(layer)}.{kind}"]
        for ours, theirs in names.items()
        for layer in range(2)
        for kind in KINDS
        if f"{theirs.format(layer)}.{kind}" in state
    }


def stacked_heads(state: State, projection: str, groups: int) -> State:
    """Our query_key_value: for each key head the rows of its query heads, the key head, the value head.

    ``projection`` is their name of the three, ``{}`` the layer and then ``q``, ``k`` or ``v``.
    """
    weights = {}
    for layer in range(2):
        for kind in KINDS:
            names = [f"{projection.format(layer, each)}.{kind}" for each in "qkv"]
            if names[0] in state:
                parts = [state[name].unflatten(0, (groups, -1)) for name in names]
                weights[f"layers.{layer}.attention.query_key_value.{kind}"] = torch.cat(parts, 1).flatten(
                    0, 1
                )
    return weights


def assert_same_logits(theirs: torch.nn.Module, ours: GPT, weights: State) -> None:
    """Copy ``weights`` (by our names, each of ours exactly once) and compare, also when read by a cache."""
    copy_and_compare(theirs, ours, weights)
    assert_same_by_cache(ours)


def copy_and_compare(
    theirs: torch.nn.Module, ours: GPT, weights: State, mask: torch.Tensor | None = None
) -> None:
    """``mask`` is for theirs."""
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


def assert_same_by_cache(gpt: GPT) -> None:
    """The prompt in two pieces, then token by token: the logits of reading all at once."""
    tokens, cache = random_tokens(2, 24), gpt.new_cache(2, 24)
    pieces = [tokens[:, :7], tokens[:, 7:21], *tokens[:, 21:].split(1, 1)]
    with torch.no_grad():
        found = torch.cat([gpt(piece, cache) for piece in pieces], 1)
        torch.testing.assert_close(found, gpt(tokens), rtol=0, atol=TOLERANCE)


def check_llama_like(
    model: type[Any], config: type[Any], kv_heads: int, theirs: dict[str, Any], **keys: Any
) -> None:
    """A model with Llama's parts; beside these, ``theirs`` are fields of its ``config`` and ``keys`` ours."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
    }
    their_model = model(config(**shape | theirs))
    state = scattered(their_model)
    weights = renamed(state, LLAMA) | stacked_heads(state, "model.layers.{}.self_attn.{}_proj", kv_heads)
    for layer in range(2):
        gate_and_up = [state[f"model.layers.{layer}.mlp.{each}_proj.weight"] for each in ("gate", "up")]
        weights[f"layers.{layer}.mlp.dense_h_to_4h.weight"] = torch.cat(gate_and_up)
    llama = {
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-6,
        "activation": "swiglu",
        "intermediate_size": 3 * 96,
        "num_kv_heads": kv_heads,
        "no_weight_tying": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    }
    assert_same_logits(their_model, small_gpt(**llama | keys), weights)
