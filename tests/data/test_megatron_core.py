"""Files against megatron-core's own reader and writer (the package is optional)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path
from megatron_lite.data.inspection import check_index
from megatron_lite.data.merging import merge

DTYPES = {"uint8": 255, "int8": 127, "uint16": 65535, "int16": 32767, "int32": 2**31 - 1, "int64": 2**62}
"""dtype → largest id tried."""


@pytest.fixture(scope="module")
def megatron() -> Iterator[Any]:
    """megatron-core's module of indexed datasets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="megatron-core is absent"
        )
    gc.freeze()  # its add_index collects garbage each time, among all that is imported here
    yield module
    gc.unfreeze()


def theirs(megatron: Any, prefix: Path, dtype: str, documents: list[list[list[int]]]) -> None:
    """Write ``documents``, each of several sequences, by megatron-core."""
    import torch

    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.dtype(dtype).type)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.from_numpy(np.array(sequence, dtype if dtype != "uint16" else "int32")))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))


@st.composite
def corpora(draw: st.DrawFn) -> tuple[str, list[list[list[int]]]]:
    """A dtype and documents of sequences of ids, with a token at least."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    sequences = st.lists(st.integers(0, DTYPES[dtype]), max_size=5)
    documents = draw(st.lists(st.lists(sequences, min_size=1, max_size=3), min_size=1, max_size=8))
    documents[draw(st.integers(0, len(documents) - 1))].append([1])
    return dtype, documents


def joined(document: list[list[int]]) -> list[int]:
    return [index for sequence in document for index in sequence]


@settings(max_examples=40)
@given(corpus=corpora())
def test_theirs_read_here(
    corpus: tuple[str, list[list[list[int]]]], megatron: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dtype, documents = corpus
    prefix = tmp_path_factory.mktemp("theirs") / "a"
    theirs(megatron, prefix, dtype, documents)
    dataset = IndexedDataset(prefix)
    check_index(dataset)
    assert dataset.dtype == np.dtype(dtype)
    assert [dataset.document(number).tolist() for number in range(dataset.document_count)] == list(
        map(joined, documents)
    )


@settings(max_examples=40)
@given(corpus=corpora())
def test_ours_are_theirs_byte_for_byte_and_read_there(
    corpus: tuple[str, list[list[list[int]]]], megatron: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dtype, documents = corpus
    folder = tmp_path_factory.mktemp("ours")
    with IndexedWriter(folder / "ours", np.dtype(dtype).newbyteorder("<")) as writer:
        for document in documents:
            writer.add(joined(document))
    theirs(megatron, folder / "theirs", dtype, [[joined(document)] for document in documents])
    for path in (bin_path, idx_path):
        assert path(folder / "ours").read_bytes() == path(folder / "theirs").read_bytes()
    read = megatron.IndexedDataset(str(folder / "ours"))
    assert [read[number].tolist() for number in range(len(read))] == list(map(joined, documents))


@settings(max_examples=20)
@given(first=corpora(), second=corpora())
def test_merged_files_are_theirs_byte_for_byte(
    first: tuple[str, list[list[list[int]]]],
    second: tuple[str, list[list[list[int]]]],
    megatron: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("merged")
    dtype = first[0]
    second = (dtype, [[[index % 100 for index in part] for part in document] for document in second[1]])
    for name, (_, documents) in (("a", first), ("b", second)):
        theirs(megatron, folder / name, dtype, documents)
    builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.dtype(dtype).type)
    builder.add_index(str(folder / "a"))
    builder.add_index(str(folder / "b"))
    builder.finalize(str(folder / "theirs.idx"))
    merge([folder / "a", folder / "b"], folder / "ours")
    for path in (bin_path, idx_path):
        assert path(folder / "ours").read_bytes() == path(folder / "theirs").read_bytes()
