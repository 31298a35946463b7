"""What the tests of data share: real text that every machine has, and small vocabularies made from it."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
import tokenizers

from megatron_lite.data.vocabulary import train_byte_level, write_sentencepiece

MODULES = [
    "argparse",
    "ast",
    "difflib",
    "email/message",
    "heapq",
    "inspect",
    "json/decoder",
    "string",
    "textwrap",
]


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """Some files of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]


@pytest.fixture(scope="session")
def bpe(source_texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of 600 ids."""
    return train_byte_level(source_texts, 600)


@pytest.fixture(scope="session")
def bpe_file(bpe: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="session")
def spm_files(source_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sentencepiece model of 600 ids of each type."""
    folder = tmp_path_factory.mktemp("spm")
    for model_type in ("bpe", "unigram"):
        write_sentencepiece(source_texts, 600, model_type, folder / f"{model_type}.model")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs."""
    folder = os.environ.get("MEGATRON_LITE_TEST_DATA")
    if not folder:
        pytest.skip("MEGATRON_LITE_TEST_DATA names no folder of real inputs")
    return Path(folder)
