"""Token files in object storage read as local ones, within the bounds of their cache."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_lite.config import config_from_keys
from megatron_lite.data import remote
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.fingerprint import fingerprint
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.remote import BLOCK_BYTES, RemoteDataset
from megatron_lite.data.stretch import Stretch
from megatron_lite.data.windows import SAMPLES_AHEAD, WindowDataset
from megatron_lite.utils.errors import DataError

LIMIT = 4 * BLOCK_BYTES


@pytest.fixture
def store() -> MemoryFileSystem:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


def write(folder: Path, store: MemoryFileSystem, seed: int = 0, documents: int = 300) -> IndexedDataset:
    """A corpus of 6 MB, here and in the store."""
    lengths = np.random.default_rng(0).integers(1, 20_000, documents)  # the same for every seed
    random = np.random.default_rng(seed)
    with IndexedWriter(folder / "a", np.dtype("<u2")) as writer:
        for length in lengths.tolist():
            writer.add(random.integers(0, 50_000, length))
    for ending in ("bin", "idx"):
        store.pipe(f"/bucket/a.{ending}", (folder / f"a.{ending}").read_bytes())
    return IndexedDataset(folder / "a")


def kept(cache: Path) -> int:
    return sum(file.stat().st_size for file in cache.glob("*/blocks/*"))


def test_every_document_is_equal_and_the_cache_is_bounded(tmp_path: Path, store: MemoryFileSystem) -> None:
    local, cache = write(tmp_path, store), tmp_path / "cache"
    far = RemoteDataset("memory://bucket/a", cache, LIMIT)
    assert kept(cache) == 0, "opening fetches no tokens"
    assert 2 * len(far.tokens) == 2 * len(local.tokens) > LIMIT
    for index in np.random.default_rng(1).permutation(300).tolist():
        assert np.array_equal(far.document(index), local.document(index))
        assert kept(cache) <= LIMIT
    assert kept(cache) >= LIMIT // 2, "what there is room for is kept"
    assert np.array_equal(far.tokens[:], local.tokens)
    assert fingerprint(far).difference(fingerprint(local)) is None


def test_what_killed_runs_left_is_deleted_like_old_blocks(tmp_path: Path, store: MemoryFileSystem) -> None:
    local, cache = write(tmp_path, store), tmp_path / "cache"
    far = RemoteDataset("memory://bucket/a", cache, LIMIT)
    (folder,) = cache.glob("*/blocks")
    leftover = folder / ".7.123.456.tmp"
    leftover.write_bytes(bytes(LIMIT))
    os.utime(leftover, (0, 0))
    assert np.array_equal(far.tokens[:], local.tokens)
    assert not leftover.exists()
    assert kept(cache) <= LIMIT


def test_what_is_kept_is_not_fetched_again(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, store)
    cache = tmp_path / "cache"
    far = RemoteDataset("memory://bucket/a", cache, 100 * BLOCK_BYTES)
    far.will_read(0, BLOCK_BYTES)  # two bytes a token
    far._blocks.fetch(range(2))  # waits for those under way
    assert kept(cache) == 2 * BLOCK_BYTES
    expected = far.tokens[10:BLOCK_BYTES]
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", None)
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)
    again = RemoteDataset("memory://bucket/a", cache, 100 * BLOCK_BYTES)
    assert np.array_equal(again.tokens[10:BLOCK_BYTES], expected)


def test_chunks_are_announced_long_before_their_samples(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write(tmp_path, store)
    stretch = Stretch(local, (0, local.document_count), 60_000, "train")
    stretch.tokens_per_chunk = 4 * 64  # many chunks in little data
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(IndexedDataset, "will_read", lambda _self, *part: announced.append(part))
    windows = WindowDataset(stretch, 64, seed=1)
    before: list[int] = []  # chunks announced when a sample was asked for
    places: list[int] = []
    original = Stretch.sample

    def note(self: Stretch, start: int, stop: int) -> object:
        places.append(start)
        return original(self, start, stop)

    monkeypatch.setattr(Stretch, "sample", note)
    for number in range(3 * SAMPLES_AHEAD):
        before.append(len(announced))
        windows[number]
    for number in range(SAMPLES_AHEAD, len(places)):
        known = announced[: before[number - SAMPLES_AHEAD + 1]]
        assert any(first <= places[number] < last for first, last in known)


def test_a_new_version_is_not_mixed_with_the_old_one(tmp_path: Path, store: MemoryFileSystem) -> None:
    cache = tmp_path / "cache"
    for seed in (0, 1):
        local = write(tmp_path, store, seed, documents=50)
        far = RemoteDataset("memory://bucket/a", cache, LIMIT)
        assert np.array_equal(far.tokens[:], local.tokens)


def test_a_run_reads_the_same_samples_from_a_url(tmp_path: Path, store: MemoryFileSystem) -> None:
    write(tmp_path, store)

    def train(path: str) -> list[list[int]]:
        keys = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 512}
        paths = {"data_path": path, "data_cache_dir": str(tmp_path / "cache"), "split": "1"}
        dataset = open_datasets(config_from_keys({**keys, **paths, "vocab_size": 60_000})).train
        return [np.asarray(dataset[number]).tolist() for number in range(50)]

    assert train("memory://bucket/a") == train(str(tmp_path / "a"))


def test_hiccups_are_ridden_out_and_failures_told(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write(tmp_path, store)
    far = RemoteDataset("memory://bucket/a", tmp_path / "cache", LIMIT)
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)
    original, failures = MemoryFileSystem.cat_ranges, [ConnectionError("reset")] * 3

    def fail_first(self: MemoryFileSystem, *arguments: object, **more: object) -> object:
        if failures:
            raise failures.pop()
        return original(self, *arguments, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", fail_first)
    assert np.array_equal(far.document(0), local.document(0))
    failures += [ConnectionError("reset")] * 4
    with pytest.raises(DataError, match=r"bucket/a\.bin cannot be read: reset"):
        far.document(299)
    store.pipe("/bucket/a.bin", bytes(100))
    with pytest.raises(DataError, match="it has changed"):
        far.document(299)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/b", r"there is no file memory://bucket/b\.idx"),
        ("nonsense://bucket/b", "nonsense://bucket/b cannot be opened"),
        ("memory://bucket/short", "memory://bucket/short: .* is truncated"),
    ],
)
def test_what_cannot_be_opened_is_named(
    url: str, message: str, tmp_path: Path, store: MemoryFileSystem
) -> None:
    write(tmp_path, store, documents=3)
    store.pipe("/bucket/short.idx", store.cat_file("/bucket/a.idx"))
    store.pipe("/bucket/short.bin", store.cat_file("/bucket/a.bin")[:-2])
    with pytest.raises(DataError, match=message):
        RemoteDataset(url, tmp_path / "cache", LIMIT)
