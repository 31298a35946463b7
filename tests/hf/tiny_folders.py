"""Hugging Face folders of tiny random models, made by transformers itself, with a byte tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lite.data.tokenizers import load_tokenizer

BYTES = SimpleNamespace(tokenizer_type="ByteTokenizer", vocab_file=None, merge_file=None)
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
OTHER_SHAPE: dict[str, dict[str, Any]] = {
    "gpt2": {"intermediate_size": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"intermediate_size": None, "rotary_dim": 4},
    "opt": {"intermediate_size": None, "ffn_dim": 56, "word_embed_proj_dim": 32},
    "mixtral": {"num_key_value_heads": 2},
    "phi3": {"pad_token_id": None},
    "stablelm": {"num_key_value_heads": 4, "rope_parameters": {"partial_rotary_factor": 0.25}},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 24,
    },
}
"""Where a family has no such field, or another of that meaning, or defaults that are too large."""


@torch.no_grad()
def make_folder(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> torch.nn.Module:
    """Write ``folder``; the model that transformers saved there.

    Every parameter, norms and biases too, is random enough to leave no mistake unseen.
    """
    shape = SHAPE | OTHER_SHAPE.get(model_type, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape | fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        parameter.normal_(mean, 0.2, generator=generator)
    model.to(dtype).save_pretrained(folder)
    load_tokenizer(BYTES).save_pretrained(folder)
    return model


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of the folder's config.json; ABSENT removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ABSENT}))


ABSENT = "<absent>"
