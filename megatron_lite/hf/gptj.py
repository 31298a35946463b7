"""GPT-J: attention and MLP side by side behind one norm, a head with a bias.

Rows of queries and keys that rotate as a pair are neighbours in its files. Attention has no biases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.parts import (
    ATTENTION_BIASES,
    Always,
    Demanded,
    Dropouts,
    InnerWidth,
    NoKeyHeads,
    Part,
    Same,
    Vocabulary,
)
from megatron_lite.hf.shape import BIASED_HEAD, gpt2_activation, shape
from megatron_lite.hf.transforms import Heads, Interleaved
from megatron_lite.hf.windows import FullAttention


@dataclass(frozen=True)
class RotaryRows(Part):
    """How many rows of a head rotate; the base is fixed."""

    keys = ("pos_emb", "rotary_emb_base", "rotary_pct")

    def read(self, fields: Fields) -> dict[str, Any]:
        """The part of a head. Raises ConfigError where that is no part."""
        rows = fields.get("rotary_dim", 64, int)
        size = fields.get("n_embd", kind=int) // fields.get("n_head", kind=int)
        if rows > size or int(rows / size * size) != rows:
            raise fields.refusal(
                "rotary_dim", rows, f"and rotary_pct here cannot say that of heads of {size}"
            )
        return {"pos_emb": "rotary", "rotary_emb_base": 10000, "rotary_pct": rows / size}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The rows."""
        return {"rotary_dim": _rotating(model)}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Other positions, another base."""
        if model.pos_emb != "rotary":
            yield f"pos_emb {model.pos_emb}"
        elif model.rotary_emb_base != 10000:
            yield f"rotary_emb_base {model.rotary_emb_base}"


def _rotating(model: ModelSection) -> int:
    return int(model.head_size * model.rotary_pct)


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    layer, theirs = "layers.{i}", "transformer.h.{i}"
    three = tuple(f"{theirs}.attn.{name}_proj" for name in "qkv")
    heads = Interleaved(Heads(model.num_attention_heads, 1, model.head_size), _rotating(model))
    rows = linear("embed_in", "transformer.wte", bias=False)
    rows += linear(f"{layer}.input_layernorm", f"{theirs}.ln_1")
    rows += linear(f"{layer}.attention.query_key_value", three, heads, bias=False)
    rows += linear(f"{layer}.attention.dense", f"{theirs}.attn.out_proj", bias=False)
    rows += linear(f"{layer}.mlp.dense_h_to_4h", f"{theirs}.mlp.fc_in")
    rows += linear(f"{layer}.mlp.dense_4h_to_h", f"{theirs}.mlp.fc_out")
    rows += linear("final_layer_norm", "transformer.ln_f")
    return rows + linear("embed_out", "lm_head")


GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    (
        *shape("n_layer", "n_embd", "n_head", "n_positions"),
        *BIASED_HEAD,
        Vocabulary(),
        InnerWidth(gated=False, theirs="n_inner", times_hidden=4, hidden="n_embd"),
        NoKeyHeads(),
        FullAttention(),
        RotaryRows(),
        gpt2_activation(),
        Same("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Dropouts("resid_pdrop", "embd_pdrop", 0.0),
        Same("attn_pdrop", "attention_dropout", 0.0),
        Always({**dict.fromkeys(ATTENTION_BIASES, False), "gpt_j_residual": True, "gpt_j_tied": True}),
        Demanded("rotary", True, default=True),
        Demanded("scale_attn_weights", True, default=True),
    ),
    entries,
    renames=((r"^(wte|h|ln_f)\.", r"transformer.\1."),),
    passed_over=(r"\.attn\.(bias|masked_bias|embed_positions)$",),
)
