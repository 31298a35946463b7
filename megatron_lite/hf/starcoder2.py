"""StarCoder 2: Llama's shape with layer norms, an MLP that is not gated, and biases."""

from __future__ import annotations

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.llama import RENAMES, rows_around
from megatron_lite.hf.parts import AllBiases, Dropouts, InnerWidth, KeyHeads, Same, Unread, Vocabulary
from megatron_lite.hf.rotary import Rotary
from megatron_lite.hf.shape import ACTIVATION, shape, tied_by_default
from megatron_lite.hf.windows import OneWindow


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    ours, theirs = "layers.{i}.mlp", "model.layers.{i}.mlp"
    rows = linear(f"{ours}.dense_h_to_4h", f"{theirs}.c_fc", bias=model.use_bias_in_mlp)
    rows += linear(f"{ours}.dense_4h_to_h", f"{theirs}.c_proj", bias=model.use_bias_in_mlp)
    return rows_around(model, rows)


STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
        *shape(default_deviation=0.018042),
        Vocabulary(),
        InnerWidth(gated=False),
        KeyHeads(default=2),
        OneWindow(default=None),
        Rotary(),
        ACTIVATION,
        AllBiases("use_bias"),
        Same("norm_epsilon", "layernorm_epsilon", 1e-5),
        Dropouts("residual_dropout", "embedding_dropout", 0.0),
        Same("attention_dropout", "attention_dropout", 0.0),
        tied_by_default(True),
        Unread(
            (
                "activation_function",
                "attention_softmax_in_fp32",
                "layer_norm_epsilon",
                "mlp_type",
                "norm_type",
                "scale_attention_softmax_in_fp32",
                "scale_attn_weights",
            )
        ),
    ),
    entries,
    RENAMES,
)
