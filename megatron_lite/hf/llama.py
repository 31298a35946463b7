"""Llama and the families that have its shape: Mistral, Qwen 2, Qwen 3, OLMo.

Their rotation is ours: channel i of a head turns with channel i + size/2. Queries, keys and values of Qwen 2
have biases, its outputs have none. Qwen 3 normalises every query and key head before it is turned, with the
epsilon of the other norms. OLMo's norms have no weights.
"""

from __future__ import annotations

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear, norm
from megatron_lite.hf.parts import (
    ATTENTION_BIASES,
    Always,
    AttentionBias,
    Demanded,
    HeadSize,
    InnerWidth,
    KeyHeads,
    Part,
    Same,
    Vocabulary,
)
from megatron_lite.hf.rotary import Rotary
from megatron_lite.hf.shape import GATED_ACTIVATION, SHAPE, tied_by_default
from megatron_lite.hf.transforms import Heads, Stacked
from megatron_lite.hf.windows import FullAttention, OneWindow, WindowedLayers

GATE, UP, DOWN = (f"{name}_proj" for name in ("gate", "up", "down"))


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    ours, theirs = "layers.{i}.mlp", "model.layers.{i}.mlp"
    return rows_around(model, gated_mlp(ours, theirs, (GATE, UP, DOWN), model.use_bias_in_mlp))


def rows_around(
    model: ModelSection, mlps: list[Entry], projections: list[Entry] | None = None
) -> list[Entry]:
    """The table, given the rows of the MLPs or of what stands in their place.

    ``projections`` are those of queries, keys and values; None: three matrices of theirs.
    """
    layer, theirs = "layers.{i}", "model.layers.{i}"
    attention = f"{theirs}.self_attn"
    rows = linear("embed_in", "model.embed_tokens", bias=False)
    rows += norm(model, f"{layer}.input_layernorm", f"{theirs}.input_layernorm")
    rows += three_matrices(model) if projections is None else projections
    if model.use_qk_layernorm:
        for name in ("q_norm", "k_norm"):
            rows += linear(f"{layer}.attention.{name}", f"{attention}.{name}", bias=False)
    rows += linear(f"{layer}.attention.dense", f"{attention}.o_proj", bias=model.use_bias_in_attn_output)
    if not (model.gpt_j_residual and model.gpt_j_tied):
        rows += norm(model, f"{layer}.post_attention_layernorm", f"{theirs}.post_attention_layernorm")
    rows += mlps
    rows += norm(model, "final_layer_norm", "model.norm")
    return rows + (linear("embed_out", "lm_head", bias=False) if model.no_weight_tying else [])


def three_matrices(model: ModelSection) -> list[Entry]:
    """The rows of the projections to queries, keys and values."""
    three = tuple(f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkv")
    return linear("layers.{i}.attention.query_key_value", three, heads_of(model), model.use_bias_in_qkv)


def heads_of(model: ModelSection) -> Heads:
    """Ours to queries, keys and values."""
    return Heads(model.num_kv_heads, model.num_attention_heads // model.num_kv_heads, model.head_size)


def gated_mlp(ours: str, theirs: str, names: tuple[str, str, str], bias: bool) -> list[Entry]:
    """The rows of one gated MLP, by their ``names`` of the matrices gate, up, down."""
    gate, up, down = (f"{theirs}.{name}" for name in names)
    rows = linear(f"{ours}.dense_h_to_4h", (gate, up), Stacked(2), bias)
    return rows + linear(f"{ours}.dense_4h_to_h", down, bias=bias)


BASE: tuple[Part, ...] = (
    *SHAPE,
    Vocabulary(),
    Same("attention_dropout", "attention_dropout", 0.0),
    tied_by_default(False),
)
RMS = Always({"norm": "rmsnorm", "gpt_j_residual": False})
GATED_MLP = (InnerWidth(gated=True), GATED_ACTIVATION)
COMMON = (*BASE, RMS, *GATED_MLP, Rotary(), Same("rms_norm_eps", "rms_norm_epsilon", 1e-6))
RENAMES = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (
        *COMMON,
        KeyHeads(),
        HeadSize(),
        FullAttention(),
        AttentionBias(False),
        Same("mlp_bias", "use_bias_in_mlp", False),
    ),
    entries,
    RENAMES,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    (
        *COMMON,
        KeyHeads(default=8),
        HeadSize(),
        OneWindow(default=4096),
        Always(dict.fromkeys((*ATTENTION_BIASES, "use_bias_in_mlp"), False)),
    ),
    entries,
    RENAMES,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (
        *COMMON,
        KeyHeads(default=32),
        WindowedLayers(),
        Always({"use_bias_in_qkv": True, "use_bias_in_attn_output": False, "use_bias_in_mlp": False}),
    ),
    entries,
    RENAMES,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (
        *COMMON,
        KeyHeads(default=32),
        HeadSize(default=128),
        WindowedLayers(),
        Always({"use_qk_layernorm": True, "use_bias_in_mlp": False}),
        AttentionBias(False),
    ),
    entries,
    RENAMES,
)

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    (
        *BASE,
        *GATED_MLP,
        Rotary(),
        KeyHeads(),
        FullAttention(),
        Always({"norm": "non_parametric_layernorm", "layernorm_epsilon": 1e-5, "use_bias_in_mlp": False}),
        AttentionBias(False),
        Demanded("clip_qkv", None, default=None),
    ),
    entries,
    RENAMES,
)
