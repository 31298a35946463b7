"""Phi 1, 1.5 and 2: attention and MLP side by side behind one norm, biases everywhere, in the head too."""

from __future__ import annotations

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.llama import heads_of
from megatron_lite.hf.parts import (
    ATTENTION_BIASES,
    Always,
    Demanded,
    Dropouts,
    InnerWidth,
    KeyHeads,
    Same,
    Vocabulary,
)
from megatron_lite.hf.rotary import Rotary
from megatron_lite.hf.shape import ACTIVATION, BIASED_HEAD, SHAPE
from megatron_lite.hf.windows import FullAttention


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    layer, theirs = "layers.{i}", "model.layers.{i}"
    three = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    rows = linear("embed_in", "model.embed_tokens", bias=False)
    rows += linear(f"{layer}.input_layernorm", f"{theirs}.input_layernorm")
    rows += linear(f"{layer}.attention.query_key_value", three, heads_of(model))
    rows += linear(f"{layer}.attention.dense", f"{theirs}.self_attn.dense")
    rows += linear(f"{layer}.mlp.dense_h_to_4h", f"{theirs}.mlp.fc1")
    rows += linear(f"{layer}.mlp.dense_4h_to_h", f"{theirs}.mlp.fc2")
    rows += linear("final_layer_norm", "model.final_layernorm")
    return rows + linear("embed_out", "lm_head")


PHI = Family(
    "phi",
    "PhiForCausalLM",
    (
        *SHAPE,
        *BIASED_HEAD,
        Vocabulary(),
        InnerWidth(gated=False),
        KeyHeads(),
        FullAttention(),
        Rotary(fraction="partial_rotary_factor", default_fraction=0.5),
        ACTIVATION,
        Same("layer_norm_eps", "layernorm_epsilon", 1e-5),
        Dropouts("resid_pdrop", "embd_pdrop", 0.0),
        Same("attention_dropout", "attention_dropout", 0.0),
        Always({**dict.fromkeys(ATTENTION_BIASES, True), "gpt_j_residual": True, "gpt_j_tied": True}),
        Demanded("qk_layernorm", False, default=False),
    ),
    entries,
    renames=((r"^(embed_tokens|layers|final_layernorm)\.", r"model.\1."),),
)
