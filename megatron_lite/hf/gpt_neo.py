"""GPT-Neo: GPT-2 with windows in every other layer, and scores that nothing divides.

Queries, keys and values are matrices of their own, [out, in], without biases; the other matrices have some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lite.config.attention import attention_kinds
from megatron_lite.config.contradiction import Contradiction
from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.parts import Always, Dropouts, InnerWidth, NoKeyHeads, Part, Same, Vocabulary
from megatron_lite.hf.shape import gpt2_activation, shape, tied_by_default
from megatron_lite.hf.transforms import Heads
from megatron_lite.hf.windows import WINDOW_KEYS


@dataclass(frozen=True)
class AttentionTypes(Part):
    """The kind of every layer's attention, in what is also our form: [[[kinds], repeats], ...].

    Their windows count as ours do: the token itself and those before it.
    """

    keys = WINDOW_KEYS

    def read(self, fields: Fields) -> dict[str, Any]:
        """Kinds, and the width if a layer has a window."""
        layers = fields.get("num_layers", 24, int)
        types = fields.get("attention_types", None, (list, type(None))) or [[["global", "local"], 12]]
        try:
            kinds = attention_kinds(types, layers)
        except Contradiction as error:
            raise fields.refusal("attention_types", types, f"and {error}") from None
        written_out = fields.get("attention_layers", None, (list, type(None)))
        if written_out is not None and tuple(written_out) != kinds:
            raise fields.refusal("attention_layers", written_out, f"and attention_types {types}: correct one")
        width = fields.get("window_size", 256, int)
        windows = {"sliding_window_width": width} if "local" in kinds else {}
        return {"attention_config": types, **windows}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """Kinds, also written out, and the width."""
        windows = model.attention_windows
        kinds = ["local" if window else "global" for window in windows]
        width = next(filter(None, windows), 256)
        return {"attention_types": [[kinds, 1]], "attention_layers": kinds, "window_size": width}


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    layer, theirs = "layers.{i}", "transformer.h.{i}"
    attention = f"{theirs}.attn.attention"
    three = tuple(f"{attention}.{name}_proj" for name in "qkv")
    heads = Heads(model.num_attention_heads, 1, model.head_size)
    rows = linear("embed_in", "transformer.wte", bias=False)
    rows += linear("embed_pos", "transformer.wpe", bias=False)
    rows += linear(f"{layer}.input_layernorm", f"{theirs}.ln_1")
    rows += linear(f"{layer}.attention.query_key_value", three, heads, bias=False)
    rows += linear(f"{layer}.attention.dense", f"{attention}.out_proj")
    rows += linear(f"{layer}.post_attention_layernorm", f"{theirs}.ln_2")
    rows += linear(f"{layer}.mlp.dense_h_to_4h", f"{theirs}.mlp.c_fc")
    rows += linear(f"{layer}.mlp.dense_4h_to_h", f"{theirs}.mlp.c_proj")
    rows += linear("final_layer_norm", "transformer.ln_f")
    return rows + (linear("embed_out", "lm_head", bias=False) if model.no_weight_tying else [])


GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    (
        *shape("num_layers", heads="num_heads"),
        Vocabulary(),
        InnerWidth(gated=False, times_hidden=4),
        NoKeyHeads(),
        AttentionTypes(),
        gpt2_activation(),
        Same("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Dropouts("resid_dropout", "embed_dropout", 0.0),
        Same("attention_dropout", "attention_dropout", 0.0),
        Always({"use_bias_in_qkv": False, "use_bias_in_attn_output": True, "attention_scale": 1.0}),
        tied_by_default(True),
    ),
    entries,
    renames=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
    passed_over=(r"\.attn\.attention\.(masked_)?bias$",),
)
