"""How an imported model generates is still so in the folder that it is exported to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_folders import ABSENT, edit_config, make_folder
from transformers import AutoTokenizer, GenerationConfig

from megatron_lite.hf import export_folder, import_folder
from megatron_lite.hf.generation_settings import exported_settings
from megatron_lite.utils.errors import DataError

GENERATION = "generation_config.json"


def there_and_back(folder: Path) -> GenerationConfig:
    import_folder(folder / "theirs", folder / "ours")
    export_folder(folder / "ours", folder / "again")
    return GenerationConfig.from_pretrained(folder / "again")


@pytest.mark.parametrize(
    ("end", "expected"), [([5, 256], [5, 256]), (256, 256), (5, [256, 5]), ([5, 6], [256, 5, 6])]
)
def test_all_settings_come_back(tmp_path: Path, end: Any, expected: Any) -> None:
    """The tokenizer of these folders ends a text with 256, and has no text for ids from 257 to 259."""
    make_folder(tmp_path / "theirs", "llama")
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "pad_token_id": 3, "bos_token_id": 7}
    theirs = GenerationConfig(**given, eos_token_id=end, suppress_tokens=[9])
    theirs.save_pretrained(tmp_path / "theirs")
    again = there_and_back(tmp_path)
    wanted = theirs.to_diff_dict() | {"eos_token_id": expected, "suppress_tokens": [9, 257, 258, 259]}
    assert again.to_diff_dict() == wanted
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["eos_token_id"] == expected


@pytest.mark.parametrize("end", [[5, 256], 256, ABSENT])
def test_settings_in_config_json(tmp_path: Path, end: Any) -> None:
    make_folder(tmp_path / "theirs", "llama")
    (tmp_path / "theirs" / GENERATION).unlink()
    edit_config(tmp_path / "theirs", eos_token_id=end)
    assert there_and_back(tmp_path).eos_token_id == (256 if end is ABSENT else end)


def test_settings_are_not_derived_anew(tmp_path: Path) -> None:
    """Older releases of transformers read settings with this mark from config.json instead."""
    make_folder(tmp_path / "theirs", "llama")
    mark = '"_from_model_config": true'
    assert mark in (tmp_path / "theirs" / GENERATION).read_text()
    assert there_and_back(tmp_path).suppress_tokens == [257, 258, 259]
    assert mark not in (tmp_path / "again" / GENERATION).read_text()


@pytest.mark.parametrize("place", ["models/llama", "models/tokenizer", "models"])
def test_a_tokenizer_alone_brings_none(tmp_path: Path, place: str) -> None:
    """A new model with another's tokenizer does not generate as that one: only an import's folder counts."""
    (tmp_path / place).mkdir(parents=True)
    beside = tmp_path / ("models" if place == "models/llama" else place)
    (beside / GENERATION).write_text('{"temperature": 0.6}')
    file = str(tmp_path / place / "tokenizer.json")
    keys = SimpleNamespace(tokenizer_type="HFTokenizer", vocab_file=file, merge_file=None)
    special = {"bos_token_id": None, "eos_token_id": 256}
    assert exported_settings(keys, special, []) == special


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}'])
def test_damaged_settings(tmp_path: Path, content: str) -> None:
    make_folder(tmp_path / "theirs", "llama")
    (tmp_path / "theirs" / GENERATION).write_text(content)
    with pytest.raises(DataError, match=GENERATION):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_chat_templates_come_back(tmp_path: Path) -> None:
    """The template of its own file, and further ones by name."""
    make_folder(tmp_path / "theirs", "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "{{ messages[0].role }}"}
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "additional_chat_templates").is_dir()
    there_and_back(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == tokenizer.chat_template
