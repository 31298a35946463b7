"""Llama's shape with mixtures of experts: Mixtral, and Qwen 3's.

A token's experts are weighted by their probabilities, divided by the sum of these. transformers keeps the
experts of a layer in two tensors, and writes each expert's matrices; both are read, the latter written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Entry, Family, linear
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.llama import BASE, DOWN, GATE, RENAMES, RMS, UP, gated_mlp, rows_around
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
)
from megatron_lite.hf.rotary import Rotary
from megatron_lite.hf.shape import GATED_ACTIVATION
from megatron_lite.hf.windows import OneWindow, SwitchedWindow


@dataclass(frozen=True)
class Experts(Part):
    """How many experts there are, how many a token goes to, how evenly training keeps them used.

    Attributes:
        counts: names of the field for the first; the first name is written.
        top_k: what the second is without its field.
        divided: the field that says whether the weights of a token's experts are divided by their sum; None:
            they are.
    """

    counts: tuple[str, ...]
    top_k: int
    divided: str | None = None
    keys = ("moe_num_experts", "moe_top_k")

    def read(self, fields: Fields) -> dict[str, Any]:
        """Both, and the coefficient: theirs multiplies k times our balance loss."""
        found = [fields.get(name, None, (int, type(None))) for name in self.counts]
        count = next(filter(None, found), None) or fields.get(self.counts[0], kind=int)
        if count < 2:
            raise fields.refusal(self.counts[0], count, "and a mixture here has two experts or more")
        top_k = fields.get("num_experts_per_tok", self.top_k, int)
        divided = fields.get(self.divided, False, bool) if self.divided else True
        if divided != (top_k > 1):
            raise fields.refusal(
                self.divided or "num_experts_per_tok",
                divided if self.divided else top_k,
                f"and of {top_k} experts a token the weights are divided by their sum here, but that of one",
            )
        coefficient = fields.get("router_aux_loss_coef", 0.001, (int, float))
        return {"moe_num_experts": count, "moe_top_k": top_k, "moe_loss_coeff": coefficient * top_k}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The same."""
        divided = {self.divided: model.moe_top_k > 1} if self.divided else {}
        return {
            self.counts[0]: model.moe_num_experts,
            "num_experts_per_tok": model.moe_top_k,
            "router_aux_loss_coef": model.moe_loss_coeff / model.moe_top_k,
            **divided,
        }

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """That there are no experts, or that the weight of a single one is not 1."""
        if model.moe_num_experts == 1:
            yield "moe_num_experts 1"
        elif self.divided is None and model.moe_top_k == 1:
            yield "moe_top_k 1"


@dataclass(frozen=True)
class SomeLayers(Part):
    """Which layers have experts: here the first of every so many, there any. The others are as wide here."""

    keys = ("expert_interval",)

    def read(self, fields: Fields) -> dict[str, Any]:
        """The distance."""
        layers = fields.get("num_hidden_layers", kind=int)
        step = fields.get("decoder_sparse_step", 1, int)
        without = fields.get("mlp_only_layers", None, (list, type(None))) or []
        mixed = [layer for layer in range(layers) if layer not in without and (layer + 1) % step == 0]
        interval = mixed[1] if len(mixed) > 1 else layers
        if mixed != list(range(0, layers, interval)):
            name, value = ("mlp_only_layers", without) if without else ("decoder_sparse_step", step)
            raise fields.refusal(
                name, value, f"which makes layers {mixed} mixtures: here it is the first of every so many"
            )
        widths = [fields.get(name, None, int) for name in ("intermediate_size", "moe_intermediate_size")]
        if len(mixed) < layers and widths[0] != widths[1]:
            raise fields.refusal(
                "intermediate_size", widths[0], f"and experts of {widths[1]}: here both are as wide"
            )
        return {"expert_interval": interval}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The layers without experts."""
        without = [layer for layer, kind in enumerate(model.mlp_kinds) if kind == "dense"]
        return {
            "decoder_sparse_step": 1,
            "mlp_only_layers": without,
            "intermediate_size": model.ffn_size,
        }


def mixtral_entries(model: ModelSection) -> list[Entry]:
    """The table of Mixtral."""
    return rows_around(model, mixtures(model, "block_sparse_moe", ("w1", "w3", "w2")))


def qwen3_entries(model: ModelSection) -> list[Entry]:
    """The table of Qwen 3 with experts."""
    return rows_around(model, mixtures(model, "mlp", (GATE, UP, DOWN)))


def mixtures(model: ModelSection, mlp: str, names: tuple[str, str, str]) -> list[Entry]:
    """The rows of all layers' routers and experts, by their ``names`` of an MLP's three matrices."""
    rows: list[Entry] = []
    for layer, kind in enumerate(model.mlp_kinds):
        ours, theirs = f"layers.{layer}.mlp", f"model.layers.{layer}.{mlp}"
        if kind == "dense":
            rows += gated_mlp(ours, theirs, names, bias=False)
            continue
        rows += linear(f"{ours}.router", f"{theirs}.gate", bias=False)
        for expert in range(model.moe_num_experts):
            rows += gated_mlp(f"{ours}.experts.{expert}", f"{theirs}.experts.{expert}", names, bias=False)
    return rows


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *BASE,
        RMS,
        GATED_ACTIVATION,
        Rotary(default_base=1e6),
        Same("rms_norm_eps", "rms_norm_epsilon", 1e-5),
        InnerWidth(gated=True),
        KeyHeads(default=8),
        HeadSize(),
        OneWindow(default=None),
        Always({**dict.fromkeys((*ATTENTION_BIASES, "use_bias_in_mlp"), False), "expert_interval": 1}),
        Experts(("num_local_experts",), top_k=2),
        Demanded("router_jitter_noise", 0.0, default=0.0),
    ),
    mixtral_entries,
    renames=(*RENAMES, (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1.")),
    fused=(
        (r"\.experts\.gate_up_proj$", (".experts.{j}.w1.weight", ".experts.{j}.w3.weight")),
        (r"\.experts\.down_proj$", (".experts.{j}.w2.weight",)),
    ),
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *BASE,
        RMS,
        GATED_ACTIVATION,
        Rotary(),
        Same("rms_norm_eps", "rms_norm_epsilon", 1e-6),
        InnerWidth(gated=True, theirs="moe_intermediate_size"),
        KeyHeads(default=4),
        HeadSize(),
        SwitchedWindow(default=4096),
        Always({"use_qk_layernorm": True, "use_bias_in_mlp": False}),
        AttentionBias(False),
        Experts(("num_experts", "num_local_experts"), top_k=8, divided="norm_topk_prob"),
        SomeLayers(),
        Demanded("use_qk_norm", True, default=True),
    ),
    qwen3_entries,
    RENAMES,
    fused=(
        (r"\.experts\.gate_up_proj$", (".experts.{j}.gate_proj.weight", ".experts.{j}.up_proj.weight")),
        (r"\.experts\.down_proj$", (".experts.{j}.down_proj.weight",)),
    ),
)
