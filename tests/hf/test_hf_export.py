"""The exported folder, loaded by transformers, computes what our model computes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.tiny_runs import NEOX, named_tensors, tiny_config, tiny_gpt
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_lite.config import Config
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.hf import verify_folder
from megatron_lite.hf.convert import write_folder
from megatron_lite.hf.shards import parse_size
from megatron_lite.utils.errors import CheckpointError, ConfigError, UserError


def export(out: Path, config: Config, **options: Any) -> Tokenizer:
    tokenizer = load_tokenizer(config.data)
    write_folder(out, config, named_tensors(tiny_gpt(config)), tokenizer, **options)
    return tokenizer


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rotary_pct": 1.0, "rotary_emb_base": 500},
        {"activation": "gelu_tanh", "layernorm_epsilon": 1e-2},
        {"activation": "relu", "use_bias_in_attn_linear": False},
        {"activation": "swish", "intermediate_size": 40, "num_layers": 1},
        {"activation": "mish", "num_attention_heads": 2, "attention_config": [[["global", "flash"], 1]]},
        {"make_vocab_size_divisible_by": 1},
    ],
    ids=str,
)
def test_logits_equal(tmp_path: Path, keys: dict[str, Any], parallel: bool, untied: bool) -> None:
    config = tiny_config(**NEOX | {"gpt_j_residual": parallel, "no_weight_tying": untied} | keys)
    export(tmp_path / "out", config)

    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)

    assert not any(report.values())
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tiny_gpt(config)(tokens)
        assert expected.std() > 0.3
        torch.testing.assert_close(theirs.eval()(tokens).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("base", "written"), [(500, "500"), (5e5, "500000"), (99.5, "99.5")])
def test_a_whole_base_is_written_as_one(tmp_path: Path, base: float, written: str) -> None:
    """GPT-NeoX's rotary_emb_base was an integer, and readers of other languages may demand one."""
    export(tmp_path / "out", tiny_config(**NEOX | {"rotary_emb_base": base}))
    assert f'"rotary_emb_base": {written},' in (tmp_path / "out" / "config.json").read_text()


def test_tokenizer_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = export(tmp_path / "out", tiny_config(**NEOX))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Grüße, 漢字 🙂\n\n  def f(x):\t1_000 <x>"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == tokenizer.eod_id
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == tokenizer.eod_id
    assert generation.suppress_tokens == list(range(257, 272))


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(tmp_path / "out", tiny_config(**NEOX))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.skipif("MEGATRON_LITE_TEST_DATA" not in os.environ, reason="needs MEGATRON_LITE_TEST_DATA")
@pytest.mark.parametrize(
    ("kind", "vocab", "merges"),
    [
        ("HFTokenizer", "gpt-neox-20b/tokenizer.json", None),
        ("GPT2BPETokenizer", "gpt2/vocab.json", "gpt2/merges.txt"),
        ("SPMTokenizer", "llama-spm/mistral-v1.model", None),
    ],
)
def test_published_vocabularies(tmp_path: Path, kind: str, vocab: str, merges: str | None) -> None:
    data = Path(os.environ["MEGATRON_LITE_TEST_DATA"])
    files = {"vocab_file": str(data / "tokenizers" / vocab)}
    if merges:
        files["merge_file"] = str(data / "tokenizers" / merges)
    tokenizer = load_tokenizer(tiny_config(**NEOX | {"tokenizer_type": kind} | files).data)
    shape = {"vocab_size": tokenizer.vocab_size, "make_vocab_size_divisible_by": 128, "tokenizer_type": kind}
    config = tiny_config(**NEOX | shape | files)
    export(tmp_path / "out", config)
    result = verify_folder(tmp_path / "out", tiny_gpt(config), tokenizer)
    assert result.passed, result
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    poems = (data / "text" / "chinese-poetry.jsonl").read_text(encoding="utf-8")[:20_000]
    for text in (poems, (data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:50_000]):
        assert theirs(text).input_ids == tokenizer.encode(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny_config(**NEOX)
    tokenizer = export(tmp_path / "out", config, dtype=dtype)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    result = verify_folder(tmp_path / "out", tiny_gpt(config), tokenizer, dtype)
    assert result.passed, result
    assert result.largest_difference < 1e-4


def test_verification_sees_one_wrong_number(tmp_path: Path) -> None:
    config = tiny_config(**NEOX)
    tokenizer = export(tmp_path / "out", config)
    gpt = tiny_gpt(config)
    with torch.no_grad():
        next(p for p in gpt.parameters() if p.dim() == 1)[3] += 0.05
    result = verify_folder(tmp_path / "out", gpt, tokenizer)
    assert not result.passed
    assert result.same_tokens
    assert "NOT" in result.report()


def test_verification_sees_another_tokenizer(tmp_path: Path) -> None:
    config = tiny_config(**NEOX)
    tokenizer = export(tmp_path / "out", config)
    file = tmp_path / "out" / "tokenizer.json"
    description = json.loads(file.read_text())
    vocabulary = description["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(description))
    result = verify_folder(tmp_path / "out", tiny_gpt(config), tokenizer)
    assert not result.same_tokens
    assert not result.passed


def test_shards_keep_to_the_size_and_hold_everything(tmp_path: Path) -> None:
    config = tiny_config(**NEOX)
    export(tmp_path / "whole", config)
    export(tmp_path / "parts", config, max_shard_size=40_000)

    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert all(file.stat().st_size < 42_000 for file in files)  # a header beside the 40,000 bytes
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert "embed_out.weight" in whole
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("parts", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_tensor_above_the_size_has_its_own_file(tmp_path: Path) -> None:
    config = tiny_config(**NEOX)
    export(tmp_path / "out", config, max_shard_size=1)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert all(len(load_file(file)) == 1 for file in files)
    assert len(files) == len(list(tiny_gpt(config).parameters()))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200", 200), ("10kb", 10_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-3MB", "0"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads 2"),
        ({"norm": "rmsnorm"}, "rmsnorm"),
        ({"pos_emb": "learned"}, "learned"),
        ({"pos_emb": "none"}, "none"),
        ({"activation": "swiglu"}, "swiglu"),
        ({"activation": "softsign"}, "softsign"),
        ({"use_qk_layernorm": True}, "use_qk_layernorm"),
        ({"gpt_j_tied": True}, "gpt_j_tied"),
        ({"use_bias_in_norms": False}, "use_bias_in_norms"),
        ({"use_bias_in_mlp": False}, "use_bias_in_mlp"),
        ({"mlm_training": True, "mlm_mask_id": 0}, "both directions"),
    ],
)
def test_what_the_family_cannot_express_is_refused(tmp_path: Path, keys: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        export(tmp_path / "out", tiny_config(**NEOX | keys), family="gpt_neox")
    assert list(tmp_path.iterdir()) == []


def without(name: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((key, tensor) for key, tensor in tensors if key != name)


def test_leftovers_on_either_side_are_errors(tmp_path: Path) -> None:
    config = tiny_config(**NEOX)
    tokenizer = load_tokenizer(config.data)
    tensors = list(named_tensors(tiny_gpt(config)))
    name = "layers.1.mlp.dense_4h_to_h.bias"
    with pytest.raises(CheckpointError, match=name):
        write_folder(tmp_path / "out", config, without(name, iter(tensors)), tokenizer)
    for extra in ("layers.2.attention.dense.bias", "layers.0.attention.rotary.inv_freq", name):
        with pytest.raises(CheckpointError, match=extra):
            write_folder(tmp_path / "out", config, [*tensors, (extra, torch.ones(3))], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_fp16_overflow_is_refused(tmp_path: Path) -> None:
    config = tiny_config(**NEOX)
    tensors = [(name, tensor * 1e6) for name, tensor in named_tensors(tiny_gpt(config))]
    with pytest.raises(CheckpointError, match="bf16"):
        write_folder(tmp_path / "out", config, tensors, load_tokenizer(config.data), torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(out, tiny_config(**NEOX))  # empty: fine
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="already there"):
        export(out, tiny_config(**NEOX))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("megatron_lite.hf.shards.save_file", full)
    with pytest.raises(UserError, match="No space"):
        export(tmp_path / "out", tiny_config(**NEOX))
    assert list(tmp_path.iterdir()) == []
