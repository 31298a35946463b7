"""Megatron's files against bytes written by hand, a real pair, and damage of every kind."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from megatron_lite.utils.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [65000], [1, 2]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> None:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)


def expected_index(lengths: list[int], code: int, itemsize: int) -> bytes:
    """The format's table, item by item."""
    count = len(lengths)
    offsets = [sum(lengths[:number]) * itemsize for number in range(count)]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", count)
        + struct.pack("<Q", count + 1)
        + np.array(lengths, "<i4").tobytes()
        + np.array(offsets, "<i8").tobytes()
        + np.arange(count + 1).astype("<i8").tobytes()
    )


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5), ("<u1", 1)])
def test_bytes_are_the_formats(tmp_path: Path, dtype: str, code: int) -> None:
    documents = [[token % 200 for token in document] for document in DOCUMENTS]
    write(tmp_path / "a", documents, dtype)
    assert (tmp_path / "a.bin").read_bytes() == np.array(
        list(chain.from_iterable(documents)), dtype
    ).tobytes()
    assert (tmp_path / "a.idx").read_bytes() == expected_index([3, 0, 1, 2], code, np.dtype(dtype).itemsize)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=30))
def test_what_is_written_is_read(
    documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "a"
    write(prefix, documents)
    if not any(documents):
        with pytest.raises(DataError, match="holds no token"):
            IndexedDataset(prefix)
        return
    dataset = IndexedDataset(prefix)
    assert dataset.document_count == len(documents)
    assert [dataset.document(number).tolist() for number in range(len(documents))] == documents
    assert dataset.tokens.tolist() == list(chain.from_iterable(documents))
    numbers = np.arange(len(documents))[::-1]
    starts, ends = dataset.bounds_of(numbers)
    assert starts.tolist() == [dataset.token_start(number) for number in numbers]
    assert ends.tolist() == [dataset.token_start(number + 1) for number in numbers]


@pytest.mark.parametrize(("entry", "value", "document"), [(1, 99, 0), (2, -1, 1), (2, 0, 1), (3, 2**40, 2)])
def test_bounds_in_a_damaged_index(tmp_path: Path, entry: int, value: int, document: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    boundaries = idx_path(tmp_path / "a").stat().st_size - 8 * (len(DOCUMENTS) + 1)
    overwrite(idx_path(tmp_path / "a"), boundaries + 8 * entry, struct.pack("<q", value))
    dataset = IndexedDataset(tmp_path / "a")
    with pytest.raises(DataError, match=f"damaged at document {document}:"):
        dataset.bounds_of(np.arange(len(DOCUMENTS)))


def test_many_documents_at_once_are_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "one", DOCUMENTS)
    with IndexedWriter(tmp_path / "many", np.dtype("<u2")) as writer:
        writer.add_many(np.array([5, 6, 7], np.int64), np.array([3, 0]))
        writer.add_many(np.array([65000, 1, 2], np.uint32), np.array([1, 2]))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"many{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()


def test_offsets_computed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lite.data.indexed.POINTER_CHUNK", 2)
    write(tmp_path / "a", [*DOCUMENTS, [9]])
    assert (tmp_path / "a.idx").read_bytes() == expected_index([3, 0, 1, 2, 1], 8, 2)


def test_dtype_is_megatrons() -> None:
    assert token_dtype(50257) == token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")


def test_a_file_written_by_megatron(real_data: Path, tmp_path: Path) -> None:
    prefix = real_data / "megatron" / "meg-gpt2-openwebtext_text_document"
    dataset = IndexedDataset(prefix)
    assert dataset.document_count == 1000
    assert len(dataset.tokens) == 1_361_845
    assert dataset.dtype == np.dtype("<u2")
    with IndexedWriter(tmp_path / "copy", token_dtype(50257)) as writer:
        for number in range(1000):
            writer.add(dataset.document(number))
    assert (tmp_path / "copy.bin").read_bytes() == bin_path(prefix).read_bytes()
    assert (tmp_path / "copy.idx").read_bytes() == idx_path(prefix).read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pair: truncate(bin_path(pair)), r"a\.bin has 11 bytes where a\.idx promises 12.*preprocess"),
        (lambda pair: truncate(idx_path(pair)), r"a\.idx has .* bytes where its header promises"),
        (lambda pair: overwrite(idx_path(pair), 0, b"PK"), r"a\.idx is not a Megatron index"),
        (lambda pair: idx_path(pair).write_bytes(b""), r"a\.idx is not a Megatron index"),
        (lambda pair: overwrite(idx_path(pair), 9, b"\x02"), "version 2"),
        (lambda pair: overwrite(idx_path(pair), 17, b"\x07"), "dtype code 7"),
        (lambda pair: overwrite(idx_path(pair), 34 + 4 * 4, b"\x01"), "it is damaged"),
        (lambda pair: bin_path(pair).unlink(), r"no file .*a\.bin"),
        (lambda pair: idx_path(pair).unlink(), r"no file .*a\.idx"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [])
    with pytest.raises(DataError, match=r"a\.idx holds no documents"):
        IndexedDataset(tmp_path / "a")


def test_an_error_leaves_the_target_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OverflowError), IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        writer.add([2**70])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


FILL = """
import sys, numpy
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.utils.errors import command_line
@command_line
def main():
    with IndexedWriter(sys.argv[1], numpy.dtype("<u2")) as writer:
        for _ in range(100):
            writer.add(numpy.zeros(10_000, "<u2"))
sys.exit(main())
"""


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "a")], preexec_fn=limit, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error:")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
