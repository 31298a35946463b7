"""What a silent config.json means, and both spellings of what changed its name: as transformers has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from generation.tiny_runs import tiny_config
from test_hf_export import export
from transformers import AutoConfig

from megatron_lite.hf.families import FAMILIES
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.rotary import ORIGINAL
from megatron_lite.utils.errors import ConfigError

WINDOWS = {"use_sliding_window": True, "num_hidden_layers": 32}
NEEDED = {"qwen3_moe": {"norm_topk_prob": True}}  # without it the model is not expressed
MODELS = [*((name, NEEDED.get(name, {})) for name in FAMILIES), ("qwen2", WINDOWS), ("qwen3", WINDOWS)]
SHAPE = {
    "vocab_size", "hidden_size", "n_embd", "intermediate_size", "ffn_dim", "moe_intermediate_size",
    "hidden_act", "num_hidden_layers", "num_layers", "n_layer", "num_attention_heads", "num_heads", "n_head",
    "num_local_experts", "max_position_embeddings", "n_positions",
}  # fmt: skip
"""Fields that every published file has: without one, the folder is damaged."""
NOT_SILENT = {"use_sliding_window", "norm_topk_prob"}
"""Where they are given: their defaults contradict layer_types, or are not expressed."""
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0}


def keys_of(folder: Path, family: str, content: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(content))
    keys = FAMILIES[family].keys(Fields(folder / "config.json"))
    return {"num_kv_heads": keys["num_attention_heads"]} | keys


@pytest.mark.parametrize(("family", "fields"), MODELS, ids=str)
def test_an_absent_field_has_the_default_of_transformers(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    """Of a default configuration, written in full, each field but those of the shape may be left out."""
    content = AutoConfig.for_model(family, **fields).to_dict()
    whole = keys_of(tmp_path, family, content)
    demanded = SHAPE | NOT_SILENT.intersection(fields)
    if family == "phi3":
        demanded |= {ORIGINAL}
    for name in content:
        try:
            keys = keys_of(tmp_path, family, {key: value for key, value in content.items() if key != name})
        except ConfigError:
            assert name in demanded, name
            continue
        assert keys == whole, name


@pytest.mark.parametrize("without", [["rope_parameters"], ["rope_theta", "rope_scaling"]])
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_each_spelling_of_the_rotation_is_enough(
    tmp_path: Path, without: list[str], scaling: dict[str, Any] | None
) -> None:
    """The dictionary is for transformers 5, the flat fields for older releases: neither may lack anything."""
    llama = {
        "pos_emb": "rotary", "norm": "rmsnorm", "activation": "swiglu", "rotary_emb_base": 5000,
        "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "max_position_embeddings": 64,
    }  # fmt: skip
    export(tmp_path / "out", tiny_config(**llama, **({"rope_scaling": scaling} if scaling else {})))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    rest = {key: value for key, value in content.items() if key not in without}
    (tmp_path / "out" / "config.json").write_text(json.dumps(rest))
    found = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert found == {"rope_type": "default", **(scaling or {}), "rope_theta": 5000}


def test_the_default_width_of_heads_is_not_always_ours(tmp_path: Path) -> None:
    """Qwen 3's heads have 128 channels when nothing says it, also in a model of 64 channels with 4 heads."""
    content = AutoConfig.for_model("qwen3", hidden_size=64, num_attention_heads=4).to_dict()
    del content["head_dim"]
    assert keys_of(tmp_path, "qwen3", content)["kv_channels"] == 128
