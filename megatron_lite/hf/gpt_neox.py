"""The GPTNeoX family: what GPT-NeoX-20B and Pythia are in transformers.

Its fused query-key-value weight has, for each head, the rows of q, k and v: our order when every query head
has its own key and value head. On disk its head is ``embed_out.weight``, in memory ``lm_head.weight``.
"""

from __future__ import annotations

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import ROTARY_BUFFERS, Entry, Family, linear
from megatron_lite.hf.parts import AttentionBias, InnerWidth, NoKeyHeads, Same, Vocabulary
from megatron_lite.hf.rotary import Rotary
from megatron_lite.hf.shape import ACTIVATION, SHAPE, tied_by_default
from megatron_lite.hf.windows import FullAttention


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    layer, theirs = "layers.{i}", "gpt_neox.layers.{i}"
    rows = [Entry("embed_in.weight", ("gpt_neox.embed_in.weight",))]
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows += linear(f"{layer}.{name}", f"{theirs}.{name}")
    for name in ("attention.query_key_value", "attention.dense"):
        rows += linear(f"{layer}.{name}", f"{theirs}.{name}", bias=model.use_bias_in_qkv)
    for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        rows += linear(f"{layer}.{name}", f"{theirs}.{name}")
    rows += linear("final_layer_norm", "gpt_neox.final_layer_norm")
    return [*rows, Entry("embed_out.weight", ("embed_out.weight",))] if model.no_weight_tying else rows


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    (
        *SHAPE,
        Vocabulary(),
        InnerWidth(gated=False),
        NoKeyHeads(),
        FullAttention(),
        Rotary("rotary_emb_base", "rotary_pct", default_fraction=0.25),
        ACTIVATION,
        Same("layer_norm_eps", "layernorm_epsilon", 1e-5),
        Same("hidden_dropout", "hidden_dropout", 0.0),
        Same("attention_dropout", "attention_dropout", 0.0),
        AttentionBias(True),
        Same("use_parallel_residual", "gpt_j_residual", True),
        tied_by_default(False),
    ),
    entries,
    renames=((r"^lm_head\.", "embed_out."), (r"^(embed_in|layers|final_layer_norm)\.", r"gpt_neox.\1.")),
    passed_over=(r"\.attention\.(masked_)?bias$", ROTARY_BUFFERS),
    tied_head="embed_out.weight",
)
