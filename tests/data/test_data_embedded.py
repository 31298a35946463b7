"""The embedded default: what is in it; races and errors leave one whole copy or none; prepare_data."""

from __future__ import annotations

import multiprocessing
import os
import sysconfig
from pathlib import Path

import pytest

from megatron_lite.config import Config, config_from_keys
from megatron_lite.data import embedded
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.prepare import prepare_data
from megatron_lite.data.tokenizers import load_tokenizer
from megatron_lite.utils.errors import DataError


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files, in place of the real one."""
    real = Path(sysconfig.get_path("stdlib"))
    root = tmp_path / "stdlib"
    for name in ("ast", "argparse", "json/decoder", "json/encoder", "site-packages/other"):
        source = real / f"{'heapq' if 'other' in name else name}.py"
        target = root / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (root / "latin.py").write_bytes(b"# caf\xe9")
    (root / "empty.py").write_bytes(b"")
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda _: str(root))
    return root


def config_for(cache: Path, **keys: object) -> Config:
    return config_from_keys(
        {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "seq_length": 32,
            "max_position_embeddings": 32,
            "train_micro_batch_size_per_gpu": 1,
            "train_iters": 1,
            "data_cache_dir": str(cache),
            **keys,
        },
        world_size=1,
    )


def test_the_text_is_the_librarys(small_library: Path, tmp_path: Path) -> None:
    config = prepare_data(config_for(tmp_path / "cache", vocab_size=400))
    assert config.model.vocab_size == 400
    tokenizer = load_tokenizer(config.data)
    assert tokenizer.vocab_size == 400
    corpus = IndexedDataset(str(config.data.data_path))
    documents = [corpus.document(number).tolist() for number in range(corpus.document_count)]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    texts = sorted(tokenizer.decode(document[:-1]) for document in documents)
    names = ("ast", "argparse", "json/decoder", "json/encoder")
    assert texts == sorted((small_library / f"{name}.py").read_text(encoding="utf-8") for name in names)
    assert tokenizer.decode(open_datasets(config).train[0].tolist())


def test_it_is_built_once_and_anew_when_the_text_changes(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    build = embedded.build
    monkeypatch.setattr(embedded, "build", lambda *words: (builds.append(words[0]), build(*words)))
    cache = tmp_path / "cache"
    first = embedded.embedded_data(cache, 300)
    assert embedded.embedded_data(cache, 300) == first
    assert len(builds) == 1
    embedded.embedded_data(cache, 301)
    (small_library / "new.py").write_text("print('new')\n")
    assert embedded.embedded_data(cache, 300).prefix != first.prefix
    assert len(set(builds)) == 3


def test_another_tokenizer_can_be_named(small_library: Path, tmp_path: Path) -> None:
    config = prepare_data(config_for(tmp_path, tokenizer_type="ByteTokenizer"))
    assert config.model.vocab_size == 257
    size = sum(len(text) for text in embedded.read_standard_library())
    assert len(IndexedDataset(str(config.data.data_path)).tokens) == size + 4  # four files


def build_in_process(cache: str, ready, results) -> None:
    ready.wait()
    data = embedded.embedded_data(Path(cache), 300)
    results.put((str(data.prefix), len(IndexedDataset(data.prefix).tokens)))


def test_processes_that_race_share_one_build(small_library: Path, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # keeps the small library in place
    ready, results = fork.Barrier(3), fork.Queue()
    processes = [
        fork.Process(target=build_in_process, args=(str(tmp_path / "cache"), ready, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=300) for _ in processes}
    for process in processes:
        process.join(timeout=300)
    assert len(found) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_an_error_leaves_nothing(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("megatron_lite.data.indexed.IndexedWriter.add_many", full_disk)
    with pytest.raises(OSError, match="No space left"):
        embedded.embedded_data(tmp_path / "cache", 300)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_python_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"give data_path, vocab_file and\s+tokenizer_type"):
        embedded.embedded_data(tmp_path / "cache")


def test_named_data_is_taken_as_it_is(tmp_path: Path, bpe_file: Path) -> None:
    keys = {"data_path": "some/prefix", "tokenizer_type": "HFTokenizer", "vocab_file": str(bpe_file)}
    config = prepare_data(config_for(tmp_path / "cache", **keys))
    assert config.data.data_path == "some/prefix"
    assert config.model.vocab_size == 600
    assert prepare_data(config_for(tmp_path / "cache", **keys, vocab_size=1000)).model.vocab_size == 1000
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_path": "some/prefix"}, r"names data \(some/prefix\) but no vocabulary: give vocab_file"),
        ({"valid_data_paths": ["a"]}, "no train_data_paths"),
        (
            {"data_path": "some/prefix", "tokenizer_type": "ByteTokenizer", "vocab_size": 100},
            "vocab_size 100 is smaller than the 257 ids of the ByteTokenizer",
        ),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_data(config_for(tmp_path, **keys))
