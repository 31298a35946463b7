"""The Chinese GPT-3 of ModelScope as one of our checkpoints.

Its files are of Megatron's form: ``model/mp_rank_00_model_states.pt`` for each tensor rank, with the names of
``modelscope/models/nlp/gpt3/distributed_gpt3.py``. They become GPT-NeoX's names and numbers of layers, whose
table then holds: sequential residual, so that biases behind a sum of ranks are copies; queries, keys and
values head by head; the head tied to the embedding.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lite.config import Config
from megatron_lite.foreign.imported import TOKENIZER_FOLDER, write_import
from megatron_lite.foreign.neox_keys import LAYER, keys_of_weights
from megatron_lite.foreign.rank_tensors import RankTensors
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.import_folder import LENGTH
from megatron_lite.hf.whole import check_free
from megatron_lite.utils.errors import DataError

WEIGHTS_FOLDER = "model"
EMBEDDING = re.compile(r"language_model\.embedding\.((?:word|position)_embeddings\.weight)")
BLOCK = re.compile(r"language_model\.encoder\.layers\.(\d+)\.(?:self_)?(.+)")
FINAL_NORM = re.compile(r"language_model\.encoder\.final_layernorm\.(weight|bias)")


def import_modelscope(folder: Path, out: Path) -> Config:
    """Write the model in ``folder`` as ``out``: checkpoint, tokenizer, model.yml; whole or not at all.

    Nothing in the files is run. Everything is checked first; then tensors stream, in the memory of one.

    Args:
        folder: config.json, tokenizer.json, and the weights in ``model/`` or beside them.
        out: the new folder of checkpoints; must not exist, or be empty.

    Returns:
        The configuration of model.yml.

    Raises:
        ConfigError: config.json says something that a model here cannot be.
        CheckpointError: weights are missing, left over, of another shape, damaged, or hold code; or ``out``
            cannot be written.
        DataError: there is no tokenizer.json.
        UserError: ``out`` has content.
    """
    check_free(out)
    fields = Fields(folder / "config.json")
    keys = _keys(fields)
    weights = folder / WEIGHTS_FOLDER
    tensors = RankTensors(weights if weights.is_dir() else folder, partial(_place, layers=keys["num_layers"]))
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} has no tokenizer.json: copy all files of the model")
    activation = "gelu_tanh" if fields.get("bias_gelu_fusion", True, bool) else "gelu"
    keys |= keys_of_weights(tensors, activation)
    keys |= {
        "tokenizer_type": "JiebaTokenizer",
        "vocab_file": str(out.absolute() / TOKENIZER_FOLDER / "tokenizer.json"),
    }
    return write_import(out, keys, tensors, "ModelScope", tokenizer=folder)


def _keys(fields: Fields) -> dict[str, Any]:
    """Our keys of config.json, with GPT3Config's defaults."""
    if fields.get("apply_residual_connection_post_layernorm", False):
        raise fields.refusal(
            "apply_residual_connection_post_layernorm", True, "and residuals here are added before the norm"
        )
    hidden = fields.get("hidden_size", 768, int)
    heads = fields.get("num_attention_heads", 12, int)
    channels = fields.get("kv_channels", None, (int, type(None)))
    if channels is not None and channels * heads != hidden:
        raise fields.refusal("kv_channels", channels, f"and heads here are {hidden}/{heads} wide")
    length = fields.get("max_position_embeddings", 2048, int)
    precision = "fp16" if fields.get("fp16", False) else "bf16" if fields.get("bf16", False) else "fp32"
    return {
        "num_layers": fields.get("num_hidden_layers", 12, int),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": min(length, LENGTH),
        "max_position_embeddings": length,
        "pos_emb": "learned",
        "norm": "layernorm",
        "layernorm_epsilon": fields.get("layernorm_epsilon", 1e-12, float),
        "hidden_dropout": fields.get("hidden_dropout", 0.1, (int, float)),
        "attention_dropout": fields.get("attention_dropout", 0.1, (int, float)),
        "init_method_std": fields.get("init_method_std", 0.02, float),
        "precision": precision,
    }


def _place(name: str, layers: int) -> tuple[int, str] | None:
    """Layer and key of a tensor called ``name``, as GPT-NeoX has them."""
    if match := EMBEDDING.fullmatch(name):
        return 0, match[1]
    if match := BLOCK.fullmatch(name):
        return LAYER + int(match[1]), match[2]
    if match := FINAL_NORM.fullmatch(name):
        return LAYER + layers + 1, f"norm.{match[1]}"
    return None
