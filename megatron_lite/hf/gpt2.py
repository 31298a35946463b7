"""GPT-2, which minGPT and nanoGPT begin from.

Its matrices are Conv1D's, [in, out]; one of them makes all queries, then all keys, then all values. Early
files name their tensors without ``transformer.``, and have the causal mask of every layer besides.
"""

from __future__ import annotations

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.parts import (
    ATTENTION_BIASES,
    Always,
    Choice,
    Demanded,
    Dropouts,
    InnerWidth,
    NoKeyHeads,
    Same,
    Vocabulary,
)
from megatron_lite.hf.shape import gpt2_activation, shape, tied_by_default
from megatron_lite.hf.transforms import Heads, Joined, Transposed
from megatron_lite.hf.windows import FullAttention


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    layer, theirs = "layers.{i}", "transformer.h.{i}"
    conv1d = Transposed()
    heads = Heads(model.num_attention_heads, 1, model.head_size)
    joined = Transposed(Joined(heads, (model.hidden_size,) * 3))
    rows = linear("embed_in", "transformer.wte", bias=False)
    rows += linear("embed_pos", "transformer.wpe", bias=False)
    rows += linear(f"{layer}.input_layernorm", f"{theirs}.ln_1")
    rows += linear(f"{layer}.attention.query_key_value", f"{theirs}.attn.c_attn", joined)
    rows += linear(f"{layer}.attention.dense", f"{theirs}.attn.c_proj", conv1d)
    rows += linear(f"{layer}.post_attention_layernorm", f"{theirs}.ln_2")
    rows += linear(f"{layer}.mlp.dense_h_to_4h", f"{theirs}.mlp.c_fc", conv1d)
    rows += linear(f"{layer}.mlp.dense_4h_to_h", f"{theirs}.mlp.c_proj", conv1d)
    rows += linear("final_layer_norm", "transformer.ln_f")
    return rows + (linear("embed_out", "lm_head", bias=False) if model.no_weight_tying else [])


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    (
        *shape("n_layer", "n_embd", "n_head", "n_positions"),
        Vocabulary(),
        InnerWidth(gated=False, theirs="n_inner", times_hidden=4, hidden="n_embd"),
        NoKeyHeads(),
        FullAttention(),
        Always(dict.fromkeys(ATTENTION_BIASES, True)),
        gpt2_activation(),
        Same("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Dropouts("resid_pdrop", "embd_pdrop", 0.1),
        Same("attn_pdrop", "attention_dropout", 0.1),
        Choice(
            "scale_attn_weights", "attention_scale", {True: None, False: 1.0}, {None: True, 1.0: False}, True
        ),
        Demanded("scale_attn_by_inverse_layer_idx", False, default=False),
        tied_by_default(True),
    ),
    entries,
    renames=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
    passed_over=(r"\.attn\.(masked_)?bias$",),
)
