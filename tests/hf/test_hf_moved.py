"""An import's folder, moved: export and generation find the tokenizer in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tiny_folders import make_folder

from megatron_lite.checkpoint.tokenizer_beside import with_tokenizer_beside
from megatron_lite.data.tokenizers.byte_alphabet import BYTE_OF_CHARACTER
from megatron_lite.generation import load_model
from megatron_lite.hf import export_folder, import_folder, verify_folder
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def gpt2_files(folder: Path) -> None:
    """GPT-2's two files instead of the tokenizer.json, with one merge."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    vocabulary = [*BYTE_OF_CHARACTER, "ab", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizers.models.BPE(ids, [("a", "b")]).save(str(folder))


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_export_and_generation(tmp_path: Path, files: str) -> None:
    make_folder(tmp_path / "theirs", "llama")
    if files == "vocab.json":
        gpt2_files(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    before = load_model(tmp_path / "ours", torch.device("cpu")).tokenizer
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    (tmp_path / "ours").rename(moved)

    export_folder(moved, tmp_path / "again")
    model = load_model(moved / "global_step0", torch.device("cpu"))
    assert model.tokenizer.fingerprint == before.fingerprint
    assert verify_folder(tmp_path / "again", model.gpt, model.tokenizer).passed

    if files == "tokenizer.json":
        told = generate_by_deepy(moved, tmp_path)
        stored, beside = (folder / "tokenizer" / files for folder in (tmp_path / "ours", moved))
        assert f"vocab_file {stored} is no longer there: reading {beside}" in told


def generate_by_deepy(moved: Path, folder: Path) -> str:
    """What ``deepy.py generate.py`` says beside the text that it writes."""
    (folder / "prompts.txt").write_text("ab")
    keys = [f"load={moved}", f"sample_input_file={folder / 'prompts.txt'}", "maximum_tokens=3"]
    command = [sys.executable, "deepy.py", "generate.py", str(moved / "model.yml"), "--set", *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\nab" in f"\n{done.stdout}", done.stdout
    return done.stderr


def test_only_the_imports_own_files_are_taken(tmp_path: Path) -> None:
    """What is still in its place is read there; a file of the same name from elsewhere is another's."""
    make_folder(tmp_path / "theirs", "llama")
    config = import_folder(tmp_path / "theirs", tmp_path / "ours")
    checkpoint = tmp_path / "ours" / "global_step0"
    assert with_tokenizer_beside(config.flat(), checkpoint) == config.flat()
    other = {"vocab_file": str(tmp_path / "gone" / "tokenizer.json")}
    assert with_tokenizer_beside(other, checkpoint) == other
    (tmp_path / "ours" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="there is no file"):
        load_model(checkpoint, torch.device("cpu"))
