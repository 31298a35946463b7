"""Checkpoints in GPT-NeoX's form, imported: the logits of transformers' model that they were cut out of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neox_files import NEOX_KEYS, VOCABULARY, llama_layers, neox_layers, renamed, tiny, write_neox
from torch.serialization import get_safe_globals, safe_globals

from megatron_lite.checkpoint import find_checkpoint, read_weights, verify
from megatron_lite.config import load_config
from megatron_lite.foreign import import_neox
from megatron_lite.generation import load_model

LLAMA_KEYS = NEOX_KEYS | {
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1.0e-6,
    "rotary-pct": 1.0,
    "gpt-j-residual": False,
    "num-kv-heads": 2,
    "activation": "swiglu",
    "intermediate-size": 3 * 56,
    "use_bias_in_attn_linear": False,
}
OLD_LLAMA_KEYS = LLAMA_KEYS | {
    "mlp-type": "llama",
    "activation": "silu",
    "intermediate-size": 56,
}
SEQUENTIAL_KEYS = NEOX_KEYS | {"gpt-j-residual": False, "no-weight-tying": False, "bias-gelu-fusion": True}


def check_same(theirs: torch.nn.Module, out: Path) -> None:
    """The checkpoint in ``out`` is sound, and its logits are those of ``theirs``."""
    verify(out)
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        logits = load_model(out, torch.device("cpu")).gpt(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parallel_residual(tmp_path: Path, ranks: int, pipeline: bool) -> None:
    """Each rank's biases are part of a sum."""
    theirs = tiny("gpt_neox", rotary_pct=0.25)
    layers = [neox_layers(theirs, rank, ranks) for rank in range(ranks)]
    write_neox(tmp_path / "theirs", layers, NEOX_KEYS, pipeline=pipeline)
    config = import_neox(tmp_path / "theirs", tmp_path / "ours")
    check_same(theirs, tmp_path / "ours")
    assert config == load_config([tmp_path / "ours" / "model.yml"])


def test_classes_that_others_declared_safe(tmp_path: Path) -> None:
    """Megatron-core and accelerate declare some of numpy's, in the whole process."""
    theirs = tiny("gpt_neox", rotary_pct=0.25)
    write_neox(tmp_path / "theirs", [neox_layers(theirs, 0, 1)], NEOX_KEYS, pipeline=False)
    declared = [np.dtype, np.ndarray, np._core.multiarray._reconstruct]
    with safe_globals(declared):
        import_neox(tmp_path / "theirs", tmp_path / "ours")
        assert set(declared) <= set(get_safe_globals())
    check_same(theirs, tmp_path / "ours")


@pytest.mark.parametrize("ranks", [1, 2])
def test_sequential_residual_tied_old_names(tmp_path: Path, ranks: int) -> None:
    """Each rank's biases are copies; with GPT-NeoX's fused GELU and names of before August 2024."""
    theirs = tiny(
        "gpt_neox", rotary_pct=0.25, use_parallel_residual=False, tie_word_embeddings=True,
        hidden_act="gelu_new",
    )  # fmt: skip
    layers = [renamed(neox_layers(theirs, rank, ranks)) for rank in range(ranks)]
    write_neox(tmp_path / "theirs", layers, SEQUENTIAL_KEYS)
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    check_same(theirs, tmp_path / "ours")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("old_mlp", "old_heads"), [(False, False), (True, True), (False, True)])
def test_llama(tmp_path: Path, ranks: int, old_mlp: bool, old_heads: bool) -> None:
    """RMSNorm, a gated MLP and grouped queries, in each of the forms that GPT-NeoX has had."""
    theirs = tiny("llama", num_key_value_heads=2)
    layers = [llama_layers(theirs, rank, ranks, old_mlp, old_heads) for rank in range(ranks)]
    write_neox(tmp_path / "theirs", layers, OLD_LLAMA_KEYS if old_mlp else LLAMA_KEYS)
    told = None if old_mlp == old_heads else old_heads  # names tell it but for three months
    import_neox(tmp_path / "theirs", tmp_path / "ours", old_grouping=told)
    check_same(theirs, tmp_path / "ours")


@pytest.mark.parametrize("ranks", [1, 2])
def test_gated_mlp_with_biases_and_old_names(tmp_path: Path, ranks: int) -> None:
    theirs = tiny("llama", num_key_value_heads=4, hidden_act="gelu", mlp_bias=True)
    layers = [renamed(llama_layers(theirs, rank, ranks, old_heads=True)) for rank in range(ranks)]
    write_neox(tmp_path / "theirs", layers, LLAMA_KEYS | {"activation": "geglu", "num-kv-heads": 4})
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    check_same(theirs, tmp_path / "ours")


def test_one_norm(tmp_path: Path) -> None:
    """With gpt_j_tied the block has one norm, and GPT-NeoX's files have another one that nobody uses."""
    theirs = tiny("gpt_neox", rotary_pct=0.25)
    layers = [neox_layers(theirs, rank, 2) for rank in range(2)]
    write_neox(tmp_path / "theirs", layers, NEOX_KEYS | {"gpt-j-tied": True})
    for block in theirs.gpt_neox.layers:
        block.post_attention_layernorm.load_state_dict(block.input_layernorm.state_dict())
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    check_same(theirs, tmp_path / "ours")


def test_learned_positions(tmp_path: Path) -> None:
    """Every rank has them whole."""
    layers = [neox_layers(tiny("gpt_neox"), rank, 2) for rank in range(2)]
    positions = torch.randn(64, 32)
    for each in layers:
        each[0]["position_embeddings.weight"] = positions
    write_neox(tmp_path / "theirs", layers, NEOX_KEYS | {"pos-emb": "learned"})
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    verify(tmp_path / "ours")
    weights = dict(read_weights(find_checkpoint(tmp_path / "ours")))
    torch.testing.assert_close(weights["embed_pos.weight"], positions, rtol=0, atol=0)


@pytest.mark.parametrize("positions", ["sinusoidal", "none"])
def test_positions_without_weights(tmp_path: Path, positions: str) -> None:
    layers = neox_layers(tiny("gpt_neox"), 0, 1)
    if positions == "sinusoidal":
        layers[0]["position_embeddings.inv_freq"] = torch.rand(16)  # a buffer
    write_neox(tmp_path / "theirs", [layers], NEOX_KEYS | {"pos-emb": positions})
    config = import_neox(tmp_path / "theirs", tmp_path / "ours")
    assert config.model.pos_emb == positions
    verify(tmp_path / "ours")


@pytest.mark.parametrize(("norm", "suffix"), [("scalenorm", "g"), ("non_parametric_layernorm", None)])
def test_norms_of_few_weights(tmp_path: Path, norm: str, suffix: str | None) -> None:
    """By the names that GPT-NeoX has for them."""
    layers = neox_layers(tiny("gpt_neox"), 0, 1)
    for layer in layers.values():
        for key in [key for key in layer if "norm" in key]:
            number = layer.pop(key)[:1]
            if suffix and key.endswith("weight"):
                layer[key.replace("weight", suffix)] = number
    write_neox(tmp_path / "theirs", [layers], NEOX_KEYS | {"norm": norm})
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    verify(tmp_path / "ours")
    weights = dict(read_weights(find_checkpoint(tmp_path / "ours")))
    if suffix:
        torch.testing.assert_close(weights["final_layer_norm.weight"], layers[5]["norm.g"])
    else:
        assert not any("norm" in name for name in weights)


def test_copies_that_rounding_led_apart_are_averaged(tmp_path: Path) -> None:
    layers = [neox_layers(tiny("gpt_neox"), rank, 2) for rank in range(2)]
    norm = layers[0][2]["input_layernorm.weight"]
    layers[1][2]["input_layernorm.weight"] = norm + 0.5
    write_neox(tmp_path / "theirs", layers, NEOX_KEYS)
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    weights = dict(read_weights(find_checkpoint(tmp_path / "ours")))
    torch.testing.assert_close(weights["layers.0.input_layernorm.weight"], norm + 0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_and_step_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = tiny("gpt_neox").to(dtype)
    write_neox(tmp_path / "theirs", [neox_layers(theirs, 0, 1)], NEOX_KEYS, step=143000)
    import_neox(tmp_path / "theirs", tmp_path / "ours")
    found = find_checkpoint(tmp_path / "ours")
    assert found.name == "global_step143000"
    weights = dict(read_weights(found))
    expected = theirs.state_dict()["gpt_neox.embed_in.weight"].float()
    torch.testing.assert_close(weights["embed_in.weight"].float(), expected, rtol=0, atol=0)
    assert (found / "weights_00000.safetensors").stat().st_size < 2.5 * sum(
        w.numel() for w in weights.values()
    )


def test_keys_of_the_run_go_on(tmp_path: Path) -> None:
    """How the model was trained is carried; machines, folders and the number of ranks are not."""
    layers = [neox_layers(tiny("gpt_neox"), rank, 2) for rank in range(2)]
    write_neox(tmp_path / "theirs", layers, NEOX_KEYS | {"sliding-window-width": 15})
    config = import_neox(tmp_path / "theirs", tmp_path / "ours")
    assert config.optimizer.lr == 6e-4
    assert config.training.train_iters == 320000
    assert (config.zero.zero_optimization.stage, config.batch.train_batch_size) == (1, 32)
    assert config.batch.gradient_accumulation_steps == 8  # on one rank
    assert config.parallel.model_parallel_size == 1
    assert (config.launcher.hostfile, config.launcher.launcher) == (None, "pdsh")
    assert config.checkpoint.finetune
    assert config.checkpoint.load == str(tmp_path / "ours")
    assert config.checkpoint.save != "checkpoints"
    assert config.model.sliding_window_width == 16  # which counts the token itself
    text = (tmp_path / "ours" / "model.yml").read_text()
    assert "softmax" not in text


def test_choosing_a_checkpoint_and_its_configuration(tmp_path: Path) -> None:
    first, second = tiny("gpt_neox"), tiny("gpt_neox", use_parallel_residual=False)
    keys: dict[str, Any] = {**NEOX_KEYS, "gpt-j-residual": False}
    write_neox(tmp_path / "theirs", [neox_layers(first, 0, 1)], NEOX_KEYS, step=5)
    checkpoint = write_neox(tmp_path / "theirs", [neox_layers(second, 0, 1)], keys, step=10)
    import_neox(tmp_path / "theirs", tmp_path / "latest")
    import_neox(tmp_path / "theirs", tmp_path / "fifth", iteration=5)
    import_neox(checkpoint, tmp_path / "itself")
    assert (tmp_path / "latest" / "global_step10").is_dir()
    check_same(first, tmp_path / "fifth")
    check_same(second, tmp_path / "itself")

    (checkpoint / "configs" / "run.yml").rename(tmp_path / "moved.yml")
    (checkpoint / "configs").rmdir()
    import_neox(checkpoint, tmp_path / "named", configs=[tmp_path / "moved.yml"])
    check_same(second, tmp_path / "named")
