"""OPT, and Galactica, which is OPT without biases and without weights in its norms.

The first token has the third row of the learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear, norm
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.parts import (
    AllBiases,
    Always,
    Choice,
    Demanded,
    InnerWidth,
    NoKeyHeads,
    Part,
    Same,
    Vocabulary,
)
from megatron_lite.hf.shape import gpt2_activation, shape, tied_by_default
from megatron_lite.hf.transforms import Heads
from megatron_lite.hf.windows import FullAttention


@dataclass(frozen=True)
class EmbeddingWidth(Part):
    """Width of the embedding, which here is that of the residual stream."""

    theirs = "word_embed_proj_dim"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Nothing, if the width is ours."""
        hidden = fields.get("hidden_size", kind=int)
        width = fields.get(self.theirs, None, (int, type(None)))
        if width not in (None, hidden):
            raise fields.refusal(
                self.theirs, width, f"and an embedding here is as wide as hidden_size, {hidden}"
            )
        return {}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The width."""
        return {self.theirs: model.hidden_size}


NORMS = {True: "layernorm", False: "non_parametric_layernorm"}


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    layer, theirs = "layers.{i}", "model.decoder.layers.{i}"
    attention, bias = f"{theirs}.self_attn", model.use_bias_in_mlp
    three = tuple(f"{attention}.{name}_proj" for name in "qkv")
    heads = Heads(model.num_attention_heads, 1, model.head_size)
    rows = linear("embed_in", "model.decoder.embed_tokens", bias=False)
    rows += linear("embed_pos", "model.decoder.embed_positions", bias=False)
    rows += norm(model, f"{layer}.input_layernorm", f"{theirs}.self_attn_layer_norm")
    rows += linear(f"{layer}.attention.query_key_value", three, heads, bias)
    rows += linear(f"{layer}.attention.dense", f"{attention}.out_proj", bias=bias)
    rows += norm(model, f"{layer}.post_attention_layernorm", f"{theirs}.final_layer_norm")
    rows += linear(f"{layer}.mlp.dense_h_to_4h", f"{theirs}.fc1", bias=bias)
    rows += linear(f"{layer}.mlp.dense_4h_to_h", f"{theirs}.fc2", bias=bias)
    rows += norm(model, "final_layer_norm", "model.decoder.final_layer_norm")
    return rows + (linear("embed_out", "lm_head", bias=False) if model.no_weight_tying else [])


OPT = Family(
    "opt",
    "OPTForCausalLM",
    (
        *shape(deviation="init_std"),
        Vocabulary(),
        EmbeddingWidth(),
        InnerWidth(gated=False, theirs="ffn_dim"),
        NoKeyHeads(),
        FullAttention(),
        gpt2_activation("relu"),
        Always({"opt_pos_emb_offset": 2, "layernorm_epsilon": 1e-5}),
        Choice(
            "layer_norm_elementwise_affine",
            "norm",
            NORMS,
            {ours: theirs for theirs, ours in NORMS.items()},
            True,
        ),
        AllBiases("enable_bias"),
        Demanded("do_layer_norm_before", True, default=True),
        Demanded("_remove_final_layer_norm", False, default=False),
        Demanded("layerdrop", 0.0, default=0.0),
        Demanded("activation_dropout", 0.0, default=0.0),
        Same("dropout", "hidden_dropout", 0.1),
        Same("attention_dropout", "attention_dropout", 0.0),
        tied_by_default(True),
    ),
    entries,
    renames=((r"^decoder\.", "model.decoder."),),
)
