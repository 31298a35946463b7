"""Folders in the form of ModelScope's GPT-3, cut out of transformers' GPT-2, whose function it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from neox_files import VOCABULARY, share, tiny

from megatron_lite.checkpoint import verify
from megatron_lite.config import load_config
from megatron_lite.foreign import import_modelscope
from megatron_lite.generation import load_model
from megatron_lite.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "model_type": "gpt3",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layernorm_epsilon": 1e-5,
    "fp16": False,
}


def gpt2() -> torch.nn.Module:
    return tiny("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)


def rank_module(model: torch.nn.Module, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What tensor rank ``rank`` has: by Megatron's names, queries, keys and values head by head."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    module = {
        "language_model.embedding.word_embeddings.weight": share(state["wte.weight"], rank, ranks),
        "language_model.embedding.position_embeddings.weight": state["wpe.weight"],
    }
    heads = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    for layer in range(2):
        old, new = f"h.{layer}.", f"language_model.encoder.layers.{layer}."
        for part in ("weight", "bias"):
            for theirs, ours in (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
                module[f"{new}{ours}.{part}"] = state[f"{old}{theirs}.{part}"]
            q, k, v = state[f"{old}attn.c_attn.{part}"].t().split(32)
            rows = [each[8 * head : 8 * head + 8] for head in heads for each in (q, k, v)]
            module[f"{new}self_attention.query_key_value.{part}"] = torch.cat(rows)
            module[f"{new}mlp.dense_h_to_4h.{part}"] = share(state[f"{old}mlp.c_fc.{part}"].t(), rank, ranks)
        for theirs, ours in (("attn.c_proj", "self_attention.dense"), ("mlp.c_proj", "mlp.dense_4h_to_h")):
            module[f"{new}{ours}.weight"] = share(state[f"{old}{theirs}.weight"].t(), rank, ranks, dim=1)
            module[f"{new}{ours}.bias"] = state[f"{old}{theirs}.bias"]
    for part in ("weight", "bias"):
        module[f"language_model.encoder.final_layernorm.{part}"] = state[f"ln_f.{part}"]
    return module


def write_modelscope(folder: Path, modules: list[dict[str, torch.Tensor]], **fields: Any) -> None:
    """Write ``folder`` with a tokenizer.json of bytes."""
    from tokenizers import Tokenizer, models

    (folder / "model").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    words = {chr(97 + index): index for index in range(26)} | {"<|endoftext|>": 26, "<sep>": 27, "\n": 28}
    Tokenizer(models.BPE(vocab=words, merges=[])).save(str(folder / "tokenizer.json"))
    for rank, module in enumerate(modules):
        content = {"module": module, "mp_world_size": len(modules), "global_steps": 3}
        torch.save(content, folder / "model" / f"mp_rank_{rank:02d}_model_states.pt")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits(tmp_path: Path, ranks: int) -> None:
    theirs = gpt2()
    write_modelscope(tmp_path / "theirs", [rank_module(theirs, rank, ranks) for rank in range(ranks)])
    config = import_modelscope(tmp_path / "theirs", tmp_path / "ours")
    verify(tmp_path / "ours")
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        logits = load_model(tmp_path / "ours", torch.device("cpu")).gpt(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert config == load_config([tmp_path / "ours" / "model.yml"])
    assert Path(config.data.vocab_file or "").is_file()


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"apply_residual_connection_post_layernorm": True}, None, ["apply_residual_connection"]),
        ({"kv_channels": 16}, None, ["kv_channels 16"]),
        ({"num_hidden_layers": 1}, None, ["12 tensor(s) without a place", "layer 03"]),
        ({}, "language_model.encoder.layers.0.extra", ["1 tensor(s) without a place"]),
        ({}, "visual.extra", ["mp_rank_00", "visual.extra"]),
    ],
)
def test_refusals(tmp_path: Path, fields: dict[str, Any], name: str | None, words: list[str]) -> None:
    module = rank_module(gpt2(), 0, 1) | ({name: torch.zeros(3)} if name else {})
    write_modelscope(tmp_path / "theirs", [module], **fields)
    with pytest.raises(UserError) as caught:
        import_modelscope(tmp_path / "theirs", tmp_path / "ours")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_no_tokenizer(tmp_path: Path) -> None:
    write_modelscope(tmp_path / "theirs", [rank_module(gpt2(), 0, 1)])
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        import_modelscope(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_command(tmp_path: Path) -> None:
    """As typed."""
    write_modelscope(tmp_path / "theirs", [rank_module(gpt2(), 0, 1)])
    command = [sys.executable, "tools/convert_from_modelscope.py", tmp_path / "theirs", tmp_path / "ours"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "model.yml").is_file()
