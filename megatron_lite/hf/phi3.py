"""Phi 3, 3.5 and 4: Llama's shape with one matrix for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.llama import BASE, GATED_MLP, RENAMES, RMS, heads_of, rows_around
from megatron_lite.hf.parts import ATTENTION_BIASES, Always, Dropouts, KeyHeads, Part, Same, Unread
from megatron_lite.hf.rotary import ORIGINAL, Rotary
from megatron_lite.hf.transforms import Joined
from megatron_lite.hf.windows import OneWindow


class FirstLength(Part):
    """The longest sequence of the first training: a field of its own, which counts before the other."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """Nothing: it must be there, and is read with the scaling."""
        fields.get(ORIGINAL, kind=int)
        return {}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The length."""
        return {
            ORIGINAL: model.rope_scaling.original_max_position_embeddings or model.max_position_embeddings
        }

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """A scaling that the family takes for another."""
        if model.rope_scaling.rope_type not in ("default", "longrope"):
            yield f"rope_scaling of type {model.rope_scaling.rope_type}"


def entries(model: ModelSection) -> list[Entry]:
    """The table."""
    ours, theirs = "layers.{i}", "model.layers.{i}"
    key_rows = model.num_kv_heads * model.head_size
    joined = Joined(heads_of(model), (model.num_attention_heads * model.head_size, key_rows, key_rows))
    name = f"{theirs}.self_attn.qkv_proj"
    projections = linear(f"{ours}.attention.query_key_value", name, joined, bias=False)
    mlps = linear(f"{ours}.mlp.dense_h_to_4h", f"{theirs}.mlp.gate_up_proj", bias=False)
    mlps += linear(f"{ours}.mlp.dense_4h_to_h", f"{theirs}.mlp.down_proj", bias=False)
    return rows_around(model, mlps, projections)


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    (
        *BASE,
        *GATED_MLP,
        RMS,
        Same("rms_norm_eps", "rms_norm_epsilon", 1e-5),
        Rotary(fraction="partial_rotary_factor", longrope_names=("su", "yarn")),
        FirstLength(),
        KeyHeads(),
        OneWindow(default=None),
        Dropouts("resid_pdrop", "embd_pdrop", 0.0),
        Always(dict.fromkeys((*ATTENTION_BIASES, "use_bias_in_mlp"), False)),
        Unread(("full_attn_mod", "interpolate_factor")),
    ),
    entries,
    RENAMES,
)
