"""Checkpoints of GPT-NeoX that cannot be read: one sentence that names the place, and nothing written."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from neox_files import NEOX_KEYS, neox_layers, tiny, write_neox

from megatron_lite.foreign import import_neox
from megatron_lite.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "layer_02-model_01-model_states.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint of two tensor ranks, to be spoilt."""
    model = tiny("gpt_neox")
    return write_neox(tmp_path / "theirs", [neox_layers(model, rank, 2) for rank in range(2)], NEOX_KEYS)


def refused(checkpoint: Path, *words: str, **arguments: Any) -> None:
    """Importing fails with one sentence that has ``words``, and leaves nothing."""
    folder = checkpoint.parent.parent
    with pytest.raises(UserError) as caught:
        import_neox(checkpoint.parent, folder / "ours", **arguments)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert sorted(path.name for path in folder.iterdir()) == ["theirs"]


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the content of a file of torch.save."""
    content = torch.load(file)
    edit(content)
    torch.save(content, file)


def set_keys(checkpoint: Path, **keys: Any) -> None:
    """Change the run's configuration."""
    file = checkpoint / "configs" / "run.yml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))


def test_a_sound_one_is_not_refused(checkpoint: Path, tmp_path: Path) -> None:
    import_neox(checkpoint.parent, tmp_path / "ours")


def test_missing_file_of_a_rank(checkpoint: Path) -> None:
    (checkpoint / BLOCK).unlink()
    refused(checkpoint, f"lacks {BLOCK}", "2 tensor ranks")


def test_missing_rank(checkpoint: Path) -> None:
    for file in checkpoint.glob("layer_*-model_01-*"):
        file.unlink()
    refused(checkpoint, "model_parallel_size 1", "says 2")


def test_missing_layer(checkpoint: Path) -> None:
    for file in checkpoint.glob("layer_03-*"):
        file.unlink()
    refused(checkpoint, "lack input_layernorm.weight of layer 03, tensor rank 0")


def test_other_number_of_ranks(checkpoint: Path) -> None:
    set_keys(checkpoint, **{"model-parallel-size": 4})
    refused(checkpoint, "model_parallel_size 2", "says 4")


def test_ranks_that_cannot_share_the_model(checkpoint: Path) -> None:
    set_keys(checkpoint, **{"num-kv-heads": 1})
    refused(checkpoint, "model_parallel_size 2", "num_kv_heads 1")


def test_left_over_tensor(checkpoint: Path) -> None:
    change(checkpoint / BLOCK, lambda state: state.update(extra=torch.zeros(3)))
    refused(checkpoint, "1 tensor(s) without a place", "extra of layer 02, tensor rank 1")


def test_attention_that_was_left_out(checkpoint: Path) -> None:
    """What GPT-NeoX computes where the MLP of a parallel residual has no biases."""
    for file in checkpoint.glob("layer_0[23]-*"):
        change(file, lambda state: [state.pop(f"mlp.linear{number}.bias") for number in (1, 2)])
    refused(checkpoint, "gpt_j_residual", "use_bias_in_mlp", "without")


def test_layers_that_the_configuration_does_not_have(checkpoint: Path) -> None:
    set_keys(checkpoint, **{"num-layers": 1})
    refused(checkpoint, "lack norm.weight of layer 04")


def test_wrong_shape(checkpoint: Path) -> None:
    change(checkpoint / BLOCK, lambda state: state.update({"attention.dense.weight": torch.zeros(32, 17)}))
    refused(checkpoint, BLOCK, "attention.dense.weight of layer 02, tensor rank 1", "[32, 17]", "[32, 16]")


def test_not_floats(checkpoint: Path) -> None:
    change(
        checkpoint / BLOCK,
        lambda state: state.update({"attention.dense.bias": torch.zeros(32, dtype=torch.int8)}),
    )
    refused(checkpoint, BLOCK, "attention.dense.bias", "dtype")


class Code:
    """Calls ``function`` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], argument: object) -> None:
        self.made_by = function, (argument,)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made_by


@pytest.mark.parametrize("function", [os.system, subprocess.getoutput])  # only one is blocked by torch.load
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, function: Callable[..., Any], zipped: bool
) -> None:
    ran = tmp_path_factory.mktemp("code") / "ran"
    content = torch.load(checkpoint / BLOCK) | {"extra": Code(function, f"touch {ran}")}
    torch.save(content, checkpoint / BLOCK, _use_new_zipfile_serialization=zipped)
    refused(checkpoint, BLOCK, *(["nothing was run"] if zipped else []))
    assert not ran.exists()
    torch.load(checkpoint / BLOCK, weights_only=False)
    assert ran.exists()  # so it would have been seen


@pytest.mark.parametrize("content", [b"", b"no file of weights", pickle.dumps([1, 2]), "half"])
def test_damaged_file(checkpoint: Path, content: bytes | str) -> None:
    whole = (checkpoint / BLOCK).read_bytes()
    (checkpoint / BLOCK).write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    refused(checkpoint, BLOCK)


def test_no_weights(checkpoint: Path) -> None:
    for file in checkpoint.glob("layer_*"):
        file.unlink()
    refused(checkpoint, "mp_rank_00_model_states.pt", "'module'")
    for file in checkpoint.glob("mp_rank_*"):
        file.unlink()
    refused(checkpoint, "neither layer_*")
    (checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    refused(checkpoint, "ZeRO stage 3")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use-qk-layernorm": True}, ["use_qk_layernorm"]),
        ({"moe-num-experts": 4}, ["moe_num_experts"]),
        ({"pos-emb": "rpe"}, ["run.yml", "pos_emb", "rpe"]),
        ({"te_mha": True}, ["run.yml", "te_mha"]),
        ({"hiden-size": 32}, ["run.yml", "no key hiden_size"]),
        ({"mlp-type": "llama", "activation": "mish"}, ["mlp_type", "mish"]),
        ({"norm": "rmsnorm"}, ["lack input_layernorm.scale of layer 02"]),
        ({"hidden-size": 64}, ["word_embeddings.weight", "[130, 32]", "[130, 64]"]),
    ],
)
def test_keys(checkpoint: Path, keys: dict[str, Any], words: list[str]) -> None:
    set_keys(checkpoint, **keys)
    refused(checkpoint, *words)


def test_no_configuration(checkpoint: Path) -> None:
    (checkpoint / "configs" / "run.yml").unlink()
    refused(checkpoint, "--config")


def test_no_such_checkpoint(checkpoint: Path) -> None:
    refused(checkpoint, "global_step9", iteration=9)


def test_what_is_there_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").touch()
    with pytest.raises(UserError, match="already there"):
        import_neox(checkpoint.parent, tmp_path / "ours")


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """As typed."""
    command = [sys.executable, "tools/convert_from_neox.py", checkpoint.parent, tmp_path / "ours"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "model.yml" in done.stdout
    assert "softmax" in done.stderr  # a retired key of the run's is told
