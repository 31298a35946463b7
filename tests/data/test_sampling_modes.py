"""The shuffle in chunks, and GPT-Neo's sampling modes, against their definitions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import permutation
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.permutation import (
    MASK,
    ChunkedShuffle,
    KeyedPermutation,
    PooledShuffle,
    mix,
    mix_each,
)
from megatron_lite.data.stitched import StitchedDataset
from megatron_lite.data.stretch import Stretch
from megatron_lite.data.windows import ChunkDataset
from megatron_lite.utils.errors import DataError

EOD = 59_999


def corpus_of(folder: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedWriter(folder / "a", np.dtype("<u2")) as writer:
        for document in documents:
            writer.add(document)
    return IndexedDataset(folder / "a")


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens count on."""
    edges = np.cumsum([0, *lengths])
    return [list(range(first, last)) for first, last in pairwise(edges.tolist())]


@given(
    size=st.integers(1, 1500), chunk=st.integers(1, 40), pool=st.integers(1, 12), key=st.integers(0, 2**60)
)
def test_the_shuffle_in_chunks_is_a_permutation(size: int, chunk: int, pool: int, key: int) -> None:
    shuffle = ChunkedShuffle(size, chunk, key, pool)
    order = [shuffle(position) for position in range(size)]
    assert sorted(order) == list(range(size))
    backwards = ChunkedShuffle(size, chunk, key, pool)
    assert [backwards(position) for position in reversed(range(size))] == order[::-1]


def test_a_pool_is_few_chunks_and_well_mixed() -> None:
    chunk, pool = 50, 16
    size = chunk * pool * 20 + 7
    shuffle = ChunkedShuffle(size, chunk, 5, pool)
    order = np.array([shuffle(position) for position in range(size)])
    for start in range(0, 19 * chunk * pool, chunk * pool):  # the last pool has the rest, too
        chunks = set((order[start : start + chunk * pool] // chunk).tolist())
        assert len(chunks) == pool, "each of its chunks is read whole"
        assert max(chunks) - min(chunks) > 8 * pool, "and they come from everywhere"
    within = order[: chunk * pool] // chunk
    assert (within[1:] == within[:-1]).mean() < 2 / pool, "neighbours are no neighbours any more"


@given(size=st.integers(1, 800), chunk=st.integers(1, 40), key=st.integers(0, 2**63 - 1))
@settings(max_examples=40)
def test_pools_as_arrays_are_a_permutation_of_chunks(size: int, chunk: int, key: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "POOL_CHUNKS", 3)
        shuffle = PooledShuffle(size, chunk, key)
    pools = [shuffle(number).tolist() for number in range(shuffle.pools)]
    assert sorted(element for pool in pools for element in pool) == list(range(size))
    assert shuffle.pools == max(1, size // chunk // 3)
    whole = size // chunk * chunk
    for pool in pools:
        assert len({element // chunk for element in pool if element < whole}) * chunk == len(
            [element for element in pool if element < whole]
        ), "chunks are not divided"


def test_a_pool_as_an_array_is_in_random_order() -> None:
    """By the mean distance of neighbours, and the numbers that stay; the hash is SplitMix64's."""
    first, second = (PooledShuffle(9000, 100, key)(0) for key in (1, 2))
    assert np.abs(np.diff(first)).mean() == pytest.approx(3000, rel=0.03)
    assert (first == np.arange(9000)).sum() < 8
    assert (first == second).sum() < 8
    values = np.array([0, 1, 77, 2**40])
    for key in (0, 5, 2**63 + 11):
        expected = [mix((value + key) & MASK) for value in values.tolist()]
        assert mix_each(values, key).tolist() == expected


def test_small_data_is_shuffled_as_a_whole() -> None:
    plain = KeyedPermutation(1000, 9)
    shuffle = ChunkedShuffle(1000, 10, 9, 60)
    assert [shuffle(n) for n in range(1000)] == [plain(n) for n in range(1000)]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda each: sum(each) > 5))
@settings(max_examples=30)
def test_chunks_come_in_the_order_of_the_file(
    lengths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("chunks"), numbered(lengths))
    dataset = ChunkDataset(Stretch(corpus, (0, len(lengths)), 60_000, "train"), 4)
    records = [list(range(start, start + 5)) for start in range(0, sum(lengths) - 4, 5)]
    assert dataset.samples_per_epoch == len(records)
    assert [dataset[n].tolist() for n in range(2 * len(records))] == 2 * records


def stitched(
    corpus: IndexedDataset, stitch: int, is_random: bool, length: int = 8, seed: int = 3
) -> StitchedDataset:
    stretch = Stretch(corpus, (0, corpus.document_count), 60_000, "train")
    return StitchedDataset(stretch, length, seed, stitch, EOD, is_random)


def documents_of(sample: list[int], lengths: list[int]) -> list[int]:
    """Which documents of ``numbered(lengths)`` a sample shows, in its order."""
    edges = np.cumsum(lengths)
    found = [int(np.searchsorted(edges, token, side="right")) for token in sample if token != EOD]
    return [number for number, before in zip(found, [-1, *found], strict=False) if number != before]


@given(
    lengths=st.lists(st.integers(5, 30), min_size=2, max_size=30),
    stitch=st.integers(2, 4),
    epoch=st.integers(0, 5),
)
@settings(max_examples=40)
def test_fixed_samples_begin_with_their_documents(
    lengths: list[int], stitch: int, epoch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = numbered(lengths)
    corpus = corpus_of(tmp_path_factory.mktemp("fixed"), documents)
    if len(documents) < stitch:
        with pytest.raises(DataError, match="fewer than stitch"):
            stitched(corpus, stitch, is_random=False)
        return
    dataset = stitched(corpus, stitch, is_random=False)  # 2 x 5 tokens are more than 8 + 1
    assert dataset.samples_per_epoch == len(lengths) // stitch
    firsts = set()
    for number in range(dataset.samples_per_epoch):
        sample = dataset[epoch * dataset.samples_per_epoch + number].tolist()
        shown = documents_of(sample, lengths)
        joined = [token for document in shown for token in [*documents[document], EOD]]
        assert sample == joined[:9]
        firsts.add(shown[0])
    assert len(firsts) == dataset.samples_per_epoch, "no document twice in an epoch"


def test_an_epoch_takes_every_document(tmp_path: Path) -> None:
    lengths = [3] * 600
    corpus = corpus_of(tmp_path, numbered(lengths))
    dataset = stitched(corpus, 3, is_random=False)
    orders = []
    for epoch in range(2):
        samples = [dataset[200 * epoch + number].tolist() for number in range(200)]
        orders.append([number for sample in samples for number in documents_of(sample, lengths)])
        assert sorted(orders[-1]) == list(range(600))
    assert orders[0] != orders[1]


def test_random_windows_lie_anywhere_in_the_joined_text(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, numbered([20, 20]))
    dataset = stitched(corpus, 2, is_random=True)
    starts = {False: set(), True: set()}
    for number in range(800):
        sample = dataset[number].tolist()
        assert sample == stitched(corpus, 2, is_random=True)[number].tolist()
        first, second = stitched(corpus, 2, is_random=False)[number].tolist()[:1], None
        joined = [*range(20), EOD, *range(20, 40)]
        if first[0] == 20:
            joined = [*range(20, 40), EOD, *range(20)]
        (second,) = (n for n in range(len(joined) - 8) if joined[n : n + 9] == sample)
        starts[first[0] == 20].add(second)
    assert starts[False] == starts[True] == set(range(41 - 8))


def test_documents_that_are_too_short_are_followed_by_others(tmp_path: Path) -> None:
    documents = [[1, EOD], [2, EOD], [], [3, EOD], [4, EOD], [5]]
    corpus = corpus_of(tmp_path, documents)
    dataset = stitched(corpus, 2, is_random=False)
    for number in range(9):
        sample = dataset[number].tolist()
        assert len(sample) == 9
        assert sample[1::2] == [EOD] * 4, "one end of document between two documents, not two"
        assert len(set(sample[::2])) == 5
    with pytest.raises(DataError, match=r"9 tokens, fewer than one sample of seq_length \+ 1 = 11"):
        stitched(corpus, 2, is_random=False, length=10)


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [[1, 2, 3, 700]])
    with pytest.raises(DataError, match=r"a\.bin holds the token id 700"):
        ChunkDataset(Stretch(corpus, (0, 1), 700, "train"), 3)[0]
