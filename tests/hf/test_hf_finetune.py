"""From a Hugging Face folder to a fine-tuned model, as typed; dtypes; names in old files; tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_folders import edit_config, make_folder
from training.training_runs import losses, records, train_rank, write_corpus
from transformers import AutoTokenizer

from megatron_lite.checkpoint import read_weights
from megatron_lite.checkpoint.index import WEIGHT, read_index
from megatron_lite.config import load_config
from megatron_lite.generation import load_model
from megatron_lite.hf import export_folder, import_folder, verify_folder

CPU = torch.device("cpu")
RunTool = Callable[..., int]
WEIGHTS = "model.safetensors"
DATA: dict[str, Any] = {
    "seq_length": 32,
    "train_batch_size": 4,
    "train_iters": 2,
    "log_interval": 1,
    "eval_interval": 0,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3}},
}


def test_two_tensor_ranks_train_as_one(tmp_path: Path) -> None:
    """With the folder's model.yml and the user's data; a shared key head, biases in part, a tied head."""
    make_folder(tmp_path / "theirs", "qwen2", num_key_value_heads=1, tie_word_embeddings=True)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    corpus = write_corpus(tmp_path)
    found = {}
    for ranks, layout in ((1, {}), (2, {"model_parallel_size": 2, "sequence_parallel": True})):
        run_dir = tmp_path / str(ranks)
        more = {**DATA, **layout, "data_path": str(corpus), "run_dir": str(run_dir), "save": str(run_dir)}
        keys = dict(load_config([tmp_path / "ours" / "model.yml"], world_size=ranks).with_keys(**more).given)
        assert run_ranks(train_rank, ranks, keys, ranks) == [0] * ranks
        found[ranks] = losses(records(run_dir)), dict(read_weights(run_dir))
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-5)
    before = dict(read_weights(tmp_path / "ours"))
    for name, weight in found[1][1].items():
        assert torch.dist(weight, before[name]) > 1e-3, name  # it has learned
        assert torch.dist(weight, found[2][1][name]) <= 1e-4 * weight.norm(), name
    export_folder(tmp_path / "2", tmp_path / "tuned", family="qwen2")
    model = load_model(tmp_path / "2", CPU)
    # transformers cuts text for Qwen 2 in its own way, whatever tokenizer.json says: logits only.
    assert verify_folder(tmp_path / "tuned", model.gpt, model.tokenizer).largest_difference < 1e-4


def test_an_import_has_no_state_to_go_on_with(tmp_path: Path) -> None:
    make_folder(tmp_path / "theirs", "llama")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    more = {
        **DATA,
        "data_path": str(write_corpus(tmp_path)),
        "run_dir": str(tmp_path / "run"),
        "finetune": False,
    }
    keys = dict(load_config([tmp_path / "ours" / "model.yml"]).with_keys(**more).given)
    with pytest.raises(
        AssertionError, match="global_step0 was imported and has weights only: begin at step 0"
    ):
        run_ranks(train_rank, 1, keys, 1)
    assert run_ranks(train_rank, 1, {**keys, "no_load_optim": True}, 1) == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    make_folder(tmp_path / "theirs", "llama", dtype, num_key_value_heads=2)
    config = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert config.precision.precision == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    index = read_index(tmp_path / "ours" / "global_step0")
    stored = {parameter.tensors[WEIGHT].dtype for parameter in index.parameters.values()}
    assert stored == {str(dtype).removeprefix("torch.")}
    export_folder(tmp_path / "ours", tmp_path / "again", dtype)
    before, after = (load_file(tmp_path / each / WEIGHTS) for each in ("theirs", "again"))
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(torch.equal(before[key], after[key]) for key in before | after)


def test_a_chosen_dtype_rounds_and_is_the_precision(tmp_path: Path, run_tool: RunTool) -> None:
    make_folder(tmp_path / "theirs", "mistral", num_key_value_heads=2)
    assert (
        run_tool("convert_from_hf", tmp_path / "theirs", tmp_path / "ours", "--dtype", "bf16", "--verify")
        == 0
    )
    config = load_config([tmp_path / "ours" / "model.yml"])
    assert config.precision.precision == "bf16"
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)
    ours = dict(read_weights(tmp_path / "ours"))
    rounded = theirs["model.embed_tokens.weight"].bfloat16().float()
    assert torch.equal(ours["embed_in.weight"], rounded)


def test_verification_fails_for_another_model(
    tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here one whose gate and up are exchanged by mistake."""
    make_folder(tmp_path / "theirs", "llama")
    monkeypatch.setattr(
        "megatron_lite.hf.transforms.Stacked.to_ours", lambda _, parts: torch.cat(list(reversed(parts)))
    )
    assert run_tool("convert_from_hf", tmp_path / "theirs", tmp_path / "ours", "--verify") == 1
    assert "NOT the same model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "fields", "rename"),
    [
        ("gpt_neox", {}, lambda name: name.replace("embed_out.", "lm_head.")),
        ("gpt_neox", {"tie_word_embeddings": True}, lambda name: name.removeprefix("gpt_neox.")),
        ("llama", {"tie_word_embeddings": True}, lambda name: name.removeprefix("model.")),
        ("gpt2", {}, lambda name: name.removeprefix("transformer.")),
    ],
)
def test_names_of_other_releases(
    tmp_path: Path, run_tool: RunTool, family: str, fields: dict[str, Any], rename: Any
) -> None:
    make_folder(tmp_path / "theirs", family, **fields)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    tensors = {rename(name): tensor for name, tensor in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    attention = {"gpt_neox": "gpt_neox.layers.0.attention", "gpt2": "transformer.h.0.attn"}.get(family)
    buffers = {rename(f"{attention}.{b}"): torch.ones(2) for b in ("bias", "masked_bias") if attention}
    save_file(tensors | buffers, tmp_path / "theirs" / WEIGHTS)
    import_folder(tmp_path / "theirs", tmp_path / "again")
    ours, again = (dict(read_weights(tmp_path / name)) for name in ("ours", "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours | again)


def test_a_tied_head_may_be_written_twice(tmp_path: Path, run_tool: RunTool) -> None:
    make_folder(tmp_path / "theirs", "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "theirs" / WEIGHTS, metadata={"format": "pt"})
    assert run_tool("convert_from_hf", tmp_path / "theirs", tmp_path / "ours", "--verify") == 0
    assert "embed_out.weight" not in dict(read_weights(tmp_path / "ours"))


def test_old_spelling_of_rotary_fields(tmp_path: Path, run_tool: RunTool) -> None:
    """As files of transformers 4 have it: scaling in a dictionary, the base beside."""
    make_folder(tmp_path / "theirs", "llama", num_key_value_heads=2)
    scaling = {"type": "linear", "factor": 2.0}
    edit_config(tmp_path / "theirs", rope_parameters=None, rope_scaling=scaling, rope_theta=500000.0)
    assert run_tool("convert_from_hf", tmp_path / "theirs", tmp_path / "ours", "--verify") == 0
    model = load_config([tmp_path / "ours" / "model.yml"]).model
    assert (model.rope_scaling.rope_type, model.rope_scaling.factor) == ("linear", 2.0)
    assert model.rotary_emb_base == 500000


def test_the_tokenizer_comes_back_whole(tmp_path: Path) -> None:
    """With the token that begins a text, which is not the one that ends it, and the chat template."""
    make_folder(tmp_path / "theirs", "llama")
    file = tmp_path / "theirs" / "tokenizer_config.json"
    more = {"bos_token": "a", "chat_template": "{{ messages[0].content }}"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ord("a"), 256)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").bos_token_id == ord("a")


def test_rows_added_on_request(tmp_path: Path, run_tool: RunTool) -> None:
    """For ids of the tokenizer (257) beyond the folder's rows, and for tensor parallelism."""
    make_folder(tmp_path / "theirs", "phi", vocab_size=251, eos_token_id=1, bos_token_id=1)
    options = ("--make-vocab-size-divisible-by", 64, "--verify")
    assert run_tool("convert_from_hf", tmp_path / "theirs", tmp_path / "ours", *options) == 0
    ours, theirs = dict(read_weights(tmp_path / "ours")), load_file(tmp_path / "theirs" / WEIGHTS)
    for name, their_name in (
        ("embed_in.weight", "model.embed_tokens.weight"),
        ("embed_out.weight", "lm_head.weight"),
        ("embed_out.bias", "lm_head.bias"),
    ):
        assert ours[name].shape == (320, *theirs[their_name].shape[1:])
        assert torch.equal(ours[name][:251], theirs[their_name])
        torch.testing.assert_close(ours[name][251:], theirs[their_name].mean(0).expand_as(ours[name][251:]))
    keys = load_config([tmp_path / "ours" / "model.yml"], ["model_parallel_size=2"]).model
    assert (keys.vocab_size, keys.padded_vocab_size) == (257, 320)


@pytest.mark.skipif("MEGATRON_LITE_TEST_DATA" not in os.environ, reason="needs MEGATRON_LITE_TEST_DATA")
@pytest.mark.parametrize(
    ("files", "kind", "ids"),
    [
        (["gpt-neox-20b/tokenizer.json"], "HFTokenizer", 50277),
        (["gpt2/vocab.json", "gpt2/merges.txt"], "GPT2BPETokenizer", 50257),
        (["llama-spm/mistral-v1.model"], "SPMTokenizer", 32000),
    ],
)
def test_published_tokenizers(
    tmp_path: Path, files: list[str], kind: str, ids: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each kind; the rows of the embedding are the folder's, more or fewer than the tokenizer's ids."""
    for rows in (50304, 260):
        folder = tmp_path / f"theirs-{rows}"
        make_folder(folder, "llama", vocab_size=rows)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        for file in files:
            source = Path(os.environ["MEGATRON_LITE_TEST_DATA"], "tokenizers", file)
            name = "tokenizer.model" if source.suffix == ".model" else source.name
            shutil.copyfile(source, folder / name)
        config = import_folder(folder, tmp_path / f"ours-{rows}")
        assert config.model.padded_vocab_size == rows
        assert config.data.tokenizer_type == kind
        assert load_model(tmp_path / f"ours-{rows}", CPU).tokenizer.vocab_size == ids
        assert (f"{ids} ids" in caplog.text) == (ids > rows)
