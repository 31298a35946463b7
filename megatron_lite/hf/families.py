"""The families there are."""

from __future__ import annotations

from megatron_lite.config import Config
from megatron_lite.hf.family import Family
from megatron_lite.hf.gpt2 import GPT2
from megatron_lite.hf.gpt_neo import GPT_NEO
from megatron_lite.hf.gpt_neox import GPT_NEOX
from megatron_lite.hf.gptj import GPTJ
from megatron_lite.hf.llama import LLAMA, MISTRAL, OLMO, QWEN2, QWEN3
from megatron_lite.hf.mixtral import MIXTRAL, QWEN3_MOE
from megatron_lite.hf.opt import OPT
from megatron_lite.hf.phi import PHI
from megatron_lite.hf.phi3 import PHI3
from megatron_lite.hf.stablelm import STABLELM
from megatron_lite.hf.starcoder2 import STARCODER2
from megatron_lite.utils.errors import ConfigError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GPT_NEOX,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GPT2,
        MIXTRAL,
        QWEN3_MOE,
        GPT_NEO,
        OPT,
        GPTJ,
        PHI,
        PHI3,
        OLMO,
        STABLELM,
        STARCODER2,
    )
}
"""By ``model_type``. A new family is one file and one name here; the first that fits a model is taken."""


def choose_family(config: Config, name: str | None = None) -> Family:
    """The family called ``name``, or else the first that can express ``config``.

    Raises:
        ConfigError: it cannot, or none can; the reasons are told.
    """
    if not config.model.causal:
        raise ConfigError(
            "no Hugging Face family here has attention in both directions (mlm_training): use the checkpoint "
            "itself, or export a model that was trained without mlm_training"
        )
    reasons = {
        family.name: list(dict.fromkeys(family.reasons_against(config)))
        for family in ([family_of(name)] if name else FAMILIES.values())
    }
    best = min(reasons, key=lambda each: len(reasons[each]))
    if reasons[best]:
        why = ", ".join(reasons[best])
        if name:
            raise ConfigError(f"the Hugging Face family {name} cannot have {why}")
        raise ConfigError(
            f"no Hugging Face family here ({', '.join(FAMILIES)}) can express this model: the nearest, "
            f"{best}, cannot have {why}"
        )
    return FAMILIES[best]


def family_of(name: str) -> Family:
    """The family of ``model_type`` ``name``; ConfigError when there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"the model_type {name!r} is unknown here: there are {', '.join(FAMILIES)}")
    return FAMILIES[name]
