"""Folders that cannot be imported: one sentence that names the place, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import ABSENT, edit_config, make_folder

from megatron_lite.checkpoint import read_weights
from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf import import_folder
from megatron_lite.hf.families import FAMILIES
from megatron_lite.hf.family import IDLE, NEUTRAL
from megatron_lite.utils.errors import UserError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sound folder."""
    folder = tmp_path_factory.mktemp("llama") / "theirs"
    make_folder(folder, "llama", num_key_value_heads=2)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, llama: dict[str, bytes]) -> Path:
    """A sound folder, to be spoilt."""
    path = tmp_path / "theirs"
    path.mkdir()
    for name, content in llama.items():
        (path / name).write_bytes(content)
    return path


def refused(folder: Path, *words: str) -> None:
    """Importing ``folder`` fails with one sentence that has ``words``, and leaves nothing."""
    with pytest.raises(UserError) as caught:
        import_folder(folder, folder.parent / "ours")
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert sorted(path.name for path in folder.parent.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "wavenet"}, ["'wavenet'", "llama"]),
        ({"model_type": ABSENT}, ["has no model_type"]),
        ({"hidden_size": ABSENT}, ["has no hidden_size"]),
        ({"hidden_size": "32"}, ["hidden_size", '"32"']),
        ({"hidden_act": "quick_gelu"}, ["hidden_act", '"quick_gelu"']),
        ({"head_dim": 16}, ["q_proj", "[32, 32]", "[64, 32]"]),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ["rope_scaling", "spiral"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor"]),
        (
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1]}},
            ["rope_parameters", "mrope_section"],
        ),
        ({"rope_theta": 500.0}, ["rope_theta 500.0", "rope_parameters says 10000.0"]),
        ({"rope_parameters": None, "rope_theta": 0}, ["rope_theta 0", "above 0"]),
        ({"rope_parameters": {"rope_theta": 0.0}}, ["rope_theta", "0.0", "above 0"]),
        ({"rope_parameters": {"rope_theta": "1e4"}}, ["rope_theta", "1e4", "above 0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"logit_scale": 0.5}, ["logit_scale 0.5", "--ignore logit_scale"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq", "made from"]),
        ({"num_hidden_layers": 1}, ["model.layers.1."]),
        ({"num_hidden_layers": 3}, ["lack model.layers.2."]),
        ({"num_key_value_heads": 4}, ["k_proj", "[16, 32]", "[32, 32]"]),
        ({"attention_bias": True}, ["q_proj.bias"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight", "tie_word_embeddings"]),
        ({"vocab_size": 256}, ["embed_tokens", "[260, 32]", "[256, 32]"]),
    ],
    ids=str,
)
def test_config(folder: Path, fields: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **fields)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx true"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention true"]),
        ("gpt_neox", {"rope_theta": 5000}, ["rope_theta 5000", "rope_parameters says 10000"]),
        ("gpt_neox", {"rotary_pct": 0.5}, ["rotary_pct 0.5", "rope_parameters says 0.25"]),
        (
            "gpt_neox",
            {"rope_parameters": None, "rotary_emb_base": 5000, "rope_theta": 1e4},
            ["rope_theta 10000.0", "rotary_emb_base says 5000"],
        ),
        (
            "gpt_neox",
            {"rope_parameters": None, "partial_rotary_factor": 0.5},
            ["partial_rotary_factor 0.5", "rotary_pct says 0.25"],
        ),
        ("stablelm", {"rope_parameters": None, "partial_rotary_factor": 0}, ["partial_rotary_factor 0"]),
        ("gpt2", {"hidden_size": 64}, ["hidden_size 64"]),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, ["attention_types", "sparse"]),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, ["attention_types", "3 layers"]),
        ("gpt_neo", {"attention_layers": ["global", "global"]}, ["attention_layers", "correct"]),
        ("gptj", {"rotary_dim": 10}, ["rotary_dim 10", "heads of 8"]),
        ("gptj", {"tie_word_embeddings": True}, ["tie_word_embeddings true"]),
        ("gptj", {"scale_attn_weights": False}, ["scale_attn_weights false"]),
        ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before false"]),
        ("opt", {"word_embed_proj_dim": 16}, ["word_embed_proj_dim 16"]),
        ("opt", {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm true"]),
        ("olmo", {"clip_qkv": 8.0}, ["clip_qkv 8.0"]),
        ("stablelm", {"qk_layernorm": True}, ["qk_layernorm true"]),
        ("phi", {"qk_layernorm": True}, ["qk_layernorm true"]),
        ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok 1"]),
        ("mixtral", {"num_local_experts": 1}, ["num_local_experts 1"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise 0.1"]),
        ("qwen3_moe", {"norm_topk_prob": False}, ["norm_topk_prob false"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step 2", "[1]"]),
        ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers [0]", "[1]"]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["intermediate_size 56", "24"]),
    ],
)
def test_config_of_family(tmp_path: Path, family: str, fields: dict[str, Any], words: list[str]) -> None:
    make_folder(tmp_path / "theirs", family)
    edit_config(tmp_path / "theirs", **fields)
    refused(tmp_path / "theirs", *words)


def spoil(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """What changes the tensors of a folder."""

    def change_folder(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return change_folder


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil(lambda t: t.pop(Q)), ["lack", Q, "layers.1.attention.query_key_value.weight"]),
        (spoil(lambda t: t.update({"model.layers.0.gate": torch.ones(1)})), ["model.layers.0.gate"]),
        (spoil(lambda t: t.update({Q: t[Q].t()[:, :8].contiguous()})), [Q, "[32, 8]", "[32, 32]", WEIGHTS]),
        (spoil(lambda t: t.update({Q: t[Q].to(torch.int8)})), [Q, "quantised"]),
        (spoil(lambda t: t.update({Q: t[Q].double()})), [Q, "save the model in one of these"]),
        (
            spoil(lambda t: t.update({"my_rotary_emb.inv_freq": torch.ones(4)})),
            ["my_rotary_emb.inv_freq", "without a place"],
        ),
        (
            spoil(lambda t: t.update({"layers.0.mlp.up_proj.weight": t[Q].clone()})),
            ["layers.0.mlp.up_proj.weight", "same"],
        ),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]), [WEIGHTS, "damaged"]),
        (lambda f: (f / WEIGHTS).unlink(), ["no weights", WEIGHTS]),
        (lambda f: (f / "config.json").unlink(), ["no config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "JSON object"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    ],
)
def test_files(folder: Path, change: Callable[[Path], object], words: list[str]) -> None:
    change(folder)
    refused(folder, *words)


def shard(folder: Path) -> None:
    """Write the weights in two files, as transformers does."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder: Path) -> None:
    """Tensors of one of ours may be in several files."""
    import_folder(folder, folder.parent / "whole")
    shard(folder)
    import_folder(folder, folder.parent / "sharded")
    whole, sharded = (dict(read_weights(folder.parent / name)) for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), ["model-00002-of-00002", "fetch"]),
        (
            lambda f: save_file({"x": torch.ones(1)}, f / "model-00002-of-00002.safetensors"),
            ["model-00002-of-00002", "index says"],
        ),
        (lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"), ["index"]),
    ],
)
def test_broken_shards(folder: Path, change: Callable[[Path], object], words: list[str]) -> None:
    shard(folder)
    change(folder)
    refused(folder, *words)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(folder: Path, zipped: bool) -> None:
    """torch.save's files, of today and of old, give the same; what old files have besides is passed over."""
    import_folder(folder, folder.parent / "ours")
    tensors = load_file(folder / WEIGHTS)
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.{name}": torch.ones(4)
        for i in range(2)
        for name in ("inv_freq", "cos_cached", "sin_cached")
    }
    torch.save(tensors | buffers, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / WEIGHTS).unlink()
    import_folder(folder, folder.parent / "again")
    ours, again = (dict(read_weights(folder.parent / name)) for name in ("ours", "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours | again)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
        lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}),
        lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
    ],
    ids=["both", "one rounded", "only the head"],
)
def test_tied_heads_in_files(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The embedding, as it was, whichever of its names the file has."""
    expected = load_file(folder / WEIGHTS)[EMBEDDING]
    edit_config(folder, tie_word_embeddings=True)
    spoil(change)(folder)
    import_folder(folder, folder.parent / "ours")
    assert torch.equal(dict(read_weights(folder.parent / "ours"))["embed_in.weight"], expected)


def test_a_tied_head_of_more_precision_is_another(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    spoil(lambda t: t.update({HEAD: t[EMBEDDING].clone(), EMBEDDING: t[EMBEDDING].bfloat16()}))(folder)
    refused(folder, HEAD, "tie_word_embeddings")


class Evil:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_nothing_is_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "more than tensors")
    assert not (folder / "executed").exists()


def test_a_field_may_be_declared_to_have_no_effect(folder: Path) -> None:
    edit_config(folder, my_note="a fine model")
    refused(folder, "my_note")
    import_folder(folder, folder.parent / "ours", ignored=["my_note"])


def test_a_full_folder_is_left_alone(folder: Path) -> None:
    out = folder.parent / "ours"
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        import_folder(folder, out)
    assert [path.name for path in out.iterdir()] == ["notes"]


def test_a_link_to_an_empty_folder_stays_one(folder: Path) -> None:
    (folder.parent / "disk").mkdir()
    (folder.parent / "ours").symlink_to(folder.parent / "disk")
    import_folder(folder, folder.parent / "ours")
    assert (folder.parent / "ours").is_symlink()
    assert (folder.parent / "disk" / "latest").is_file()


@pytest.mark.parametrize("kind", ["current folder", "mount point"])
def test_a_folder_that_cannot_be_replaced_is_refused_at_once(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before config.json is read."""
    out = folder.parent / "ours"
    out.mkdir()
    (folder / "config.json").unlink()
    if kind == "current folder":
        monkeypatch.chdir(out)
        out = Path(".")
    else:
        monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with pytest.raises(UserError, match=f"{kind}.*name a new folder"):
        import_folder(folder, out)
    assert not list(out.iterdir())


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_lite.checkpoint.files._flush", full)
    refused(folder, "No space left")


def test_fp16_overflow_is_refused(folder: Path) -> None:
    spoil(lambda t: t.update({Q: t[Q] * 1e6}))(folder)
    with pytest.raises(UserError, match=re.escape("fp16 cannot hold")):
        import_folder(folder, folder.parent / "ours", torch.float16)
    assert not (folder.parent / "ours").exists()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_key_of_the_model_is_unmapped(family: Any) -> None:
    """Each is said by a part, means nothing to a trained model, or has a default that is the only value."""
    said = {key for part in family.parts for key in part.keys}
    for key, described in ModelSection.model_fields.items():
        if key not in said | NEUTRAL | IDLE.keys():
            assert not described.is_required(), key
            assert not (described.json_schema_extra or {}).get("derived"), key


@pytest.mark.parametrize(
    ("files", "content"),
    [
        (["vocab.json", "merges.txt"], {"eos_token": "</s>"}),
        (["vocab.json", "merges.txt"], {"add_bos_token": True}),
        (["tokenizer.model"], {"eos_token": "<|im_end|>"}),
        (["tokenizer.model"], {"added_tokens_decoder": {"32000": {"content": "<|im_start|>"}}}),
    ],
)
def test_tokens_that_only_tokenizer_json_would_have(
    folder: Path, files: list[str], content: dict[str, Any]
) -> None:
    (folder / "tokenizer.json").unlink()
    for name in files:
        (folder / name).touch()
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    refused(folder, "put its tokenizer.json there")
