"""StableLM: Llama's shape with layer norms, heads that turn in part, a parallel residual behind one norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.family import Family
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.llama import BASE, GATED_MLP, RENAMES, entries
from megatron_lite.hf.parts import Always, Demanded, KeyHeads, Part, Same
from megatron_lite.hf.rotary import Rotary
from megatron_lite.hf.windows import FullAttention


@dataclass(frozen=True)
class Residual(Part):
    """Whether attention and MLP stand side by side, which they do behind one norm."""

    keys = ("gpt_j_residual", "gpt_j_tied")

    def read(self, fields: Fields) -> dict[str, Any]:
        """The same for both keys."""
        return dict.fromkeys(self.keys, fields.get("use_parallel_residual", False, bool))

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The first, which the second goes with."""
        return {"use_parallel_residual": model.gpt_j_residual}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Side by side, each behind its own norm."""
        if model.gpt_j_residual and not model.gpt_j_tied:
            yield f"gpt_j_tied {model.gpt_j_tied}"


STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    (
        *BASE,
        *GATED_MLP,
        Rotary(fraction="partial_rotary_factor", default_fraction=0.25),
        KeyHeads(default=32),
        FullAttention(),
        Same("layer_norm_eps", "layernorm_epsilon", 1e-5),
        Residual(),
        Same("use_qkv_bias", "use_bias_in_qkv", False),
        Always({"use_bias_in_attn_output": False, "use_bias_in_mlp": False}),
        Same("hidden_dropout", "hidden_dropout", 0.0),
        Demanded("qk_layernorm", False, default=False),
    ),
    entries,
    RENAMES,
)
