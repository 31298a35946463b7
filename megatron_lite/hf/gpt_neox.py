"""The GPTNeoX family: what GPT-NeoX-20B and Pythia are in transformers.

Its fused query-key-value weight has, for each head, the rows of q, k and v: our order when every query head
has its own key and value head. On disk its head is ``embed_out.weight``, in memory ``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lite.config import Config
from megatron_lite.hf.family import Entry, Family

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
"""Our activation → ``hidden_act``."""


def reasons_against(config: Config) -> Iterator[str]:
    """Why the family cannot express ``config``."""
    model = config.model
    if model.num_kv_heads != model.num_attention_heads:
        yield (
            f"it has no grouped-query attention (num_kv_heads {model.num_kv_heads} of "
            f"{model.num_attention_heads} heads)"
        )
    if model.norm != "layernorm":
        yield f"its norm is layernorm (norm is {model.norm})"
    if model.pos_emb != "rotary":
        yield f"its positions are rotary (pos_emb is {model.pos_emb})"
    if model.is_gated:
        yield f"its MLP is not gated (activation is {model.activation})"
    elif model.activation not in ACTIVATIONS:
        yield f"it has no such activation (activation is {model.activation})"
    if model.moe_num_experts > 1:
        yield f"it has no experts (moe_num_experts is {model.moe_num_experts})"
    if model.use_qk_layernorm:
        yield "it does not normalise queries and keys (use_qk_layernorm)"
    if model.gpt_j_residual and model.gpt_j_tied:
        yield "its attention and MLP do not share a norm (gpt_j_tied)"
    if not model.use_bias_in_norms:
        yield "its norms have biases (use_bias_in_norms is false)"
    if not model.use_bias_in_mlp:
        yield "its MLP has biases (use_bias_in_mlp is false)"
    if any(model.attention_windows):
        width = model.sliding_window_width
        yield f"its attention sees all that came before (sliding_window_width is {width})"


def config_json(config: Config) -> dict[str, Any]:
    """config.json of ``config``, without dtype and special tokens."""
    model = config.model
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "attention_bias": model.use_bias_in_attn_linear,
        "use_parallel_residual": model.gpt_j_residual,
        "tie_word_embeddings": not model.no_weight_tying,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        # transformers 5 reads the dictionary; older releases and other readers the two flat keys.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(model.rotary_emb_base),
            "partial_rotary_factor": model.rotary_pct,
        },
        "rotary_emb_base": model.rotary_emb_base,
        "rotary_pct": model.rotary_pct,
    }


def entries(config: Config) -> list[Entry]:
    """The table: every tensor of the family, the head only when it is untied."""
    model = config.model
    both = ["input_layernorm", "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    inside = [f"{module}.{part}" for module in both for part in ("weight", "bias")]
    for linear in ("attention.query_key_value", "attention.dense"):
        inside += [f"{linear}.weight"]
        inside += [f"{linear}.bias"] if model.use_bias_in_attn_linear else []
    head = [Entry("embed_out.weight", "embed_out.weight")] if model.no_weight_tying else []
    return [
        Entry("embed_in.weight", "gpt_neox.embed_in.weight"),
        *(Entry(f"layers.{{i}}.{name}", f"gpt_neox.layers.{{i}}.{name}") for name in inside),
        *(
            Entry(f"final_layer_norm.{part}", f"gpt_neox.final_layer_norm.{part}")
            for part in ("weight", "bias")
        ),
        *head,
    ]


GPT_NEOX = Family("gpt_neox", reasons_against, config_json, entries)
