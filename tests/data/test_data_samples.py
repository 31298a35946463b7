"""Windows, splits, blends and batches against the plain definition, computed by brute force."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.batches import document_starts, micro_batch
from megatron_lite.data.datasets import document_bounds, open_datasets, split_shares
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.stretch import Stretch
from megatron_lite.data.windows import WindowDataset
from megatron_lite.utils.errors import DataError


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def counting_documents(lengths: list[int], start: int = 0) -> list[list[int]]:
    """Documents whose tokens count on: a token tells its place in the stream."""
    edges = np.cumsum([start, *lengths])
    return [list(range(first, last)) for first, last in pairwise(edges)]


def config_for(**keys: object) -> Config:
    return config_from_keys(
        {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "seq_length": 8,
            "max_position_embeddings": 8,
            "vocab_size": 60000,
            "train_micro_batch_size_per_gpu": 1,
            "train_iters": 1,
            **keys,
        },
        world_size=1,
    )


@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=20),
    seq_length=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_an_epoch_is_every_window_once(
    lengths: list[int],
    seq_length: int,
    seed: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    first = data.draw(st.integers(0, len(lengths) - 1))
    last = data.draw(st.integers(first, len(lengths)))
    documents = counting_documents(lengths)
    stream = list(chain.from_iterable(documents[first:last]))
    windows = [
        stream[start : start + seq_length + 1] for start in range(0, len(stream) - seq_length, seq_length)
    ]
    if sum(lengths) == 0:
        return
    corpus = IndexedDataset(write(tmp_path_factory.mktemp("corpus") / "a", documents))
    if not windows:
        with pytest.raises(
            DataError, match=rf"{last - first} of {len(lengths)} documents and {len(stream)} "
        ):
            WindowDataset(Stretch(corpus, (first, last), 60000, "train"), seq_length, seed)
        return
    dataset = WindowDataset(Stretch(corpus, (first, last), 60000, "train"), seq_length, seed)
    assert dataset.tokens == len(stream)
    assert dataset.samples_per_epoch == len(windows)
    for epoch in (0, 1, 5):
        samples = [dataset[epoch * len(windows) + number] for number in range(len(windows))]
        assert all(sample.dtype == np.int64 and sample.shape == (seq_length + 1,) for sample in samples)
        assert sorted(sample.tolist() for sample in samples) == sorted(windows)


def test_epochs_and_seeds_shuffle_differently_and_any_sample_comes_alone(tmp_path: Path) -> None:
    corpus = IndexedDataset(write(tmp_path / "a", counting_documents([4001])))
    orders = {}
    for seed in (1, 2):
        dataset = WindowDataset(Stretch(corpus, (0, 1), 60000, "train"), 4, seed)
        for epoch in (0, 1, 7):
            orders[seed, epoch] = [int(dataset[1000 * epoch + number][0]) for number in range(1000)]
    for left, right in pairwise(orders.values()):
        assert sum(a == b for a, b in zip(left, right, strict=True)) < 10
    again = WindowDataset(Stretch(corpus, (0, 1), 60000, "train"), 4, 2)
    assert int(again[7123][0]) == orders[2, 7][123]
    assert int(again[5][0]) == orders[2, 0][5]


def test_ids_outside_the_vocabulary_are_named_when_they_are_read(tmp_path: Path) -> None:
    corpus = IndexedDataset(write(tmp_path / "a", [[1, 2, 3, 4, 500]]))
    dataset = WindowDataset(Stretch(corpus, (0, 1), 500, "train"), 4, 0)
    with pytest.raises(DataError, match=r"a\.bin holds the token id 500, outside the vocabulary of 500"):
        dataset[0]
    with IndexedWriter(tmp_path / "b", np.dtype("<i4")) as writer:
        writer.add([1, 2, -3])
    dataset = WindowDataset(Stretch(IndexedDataset(tmp_path / "b"), (0, 1), 500, "train"), 2, 0)
    with pytest.raises(DataError, match="token id -3"):
        dataset[0]


def test_shares() -> None:
    assert split_shares("969, 30, 1") == pytest.approx((0.969, 0.030, 0.001))
    assert split_shares("9/1") == pytest.approx((0.9, 0.1, 0))
    assert split_shares("1") == (1, 0, 0)
    for wrong in ("", "a, b", "1, 2, 3, 4", "-1, 2", "0, 0"):
        with pytest.raises(DataError, match="three numbers"):
            split_shares(wrong)


@given(
    numbers=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any),
    documents=st.integers(0, 10_000_000),
)
def test_splits_partition_the_documents_in_proportion(numbers: list[int], documents: int) -> None:
    bounds = document_bounds(", ".join(map(str, numbers)), documents)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == documents
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    for (first, last), number in zip(bounds, numbers, strict=False):
        assert abs((last - first) - documents * number / sum(numbers)) <= 1


def test_one_path_is_split_by_document(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", counting_documents([50] * 10))
    splits = open_datasets(config_for(data_path=str(prefix), split="8, 1, 1"))
    assert splits.valid is not None
    assert splits.test is not None
    assert (splits.train.tokens, splits.valid.tokens, splits.test.tokens) == (400, 50, 50)
    assert {int(token) for number in range(6) for token in splits.valid[number]} <= set(range(400, 450))
    assert {int(token) for number in range(6) for token in splits.test[number]} <= set(range(450, 500))


def test_a_split_without_share_is_none_and_one_without_text_says_so(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "a", counting_documents([50] * 10)))
    assert open_datasets(config_for(data_path=prefix, split="9, 1, 0")).test is None
    splits = open_datasets(config_for(data_path=prefix, split="969, 30, 1"))
    assert splits.train.tokens == 500
    with pytest.raises(DataError, match=r"valid split of .*a has 0 of 10 documents and 0 tokens"):
        _ = splits.valid


def test_validation_does_not_depend_on_the_runs_seed(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "a", counting_documents([500] * 10)))
    one, other = (open_datasets(config_for(data_path=prefix, split="5, 5", seed=seed)) for seed in (1, 2))
    assert one.valid is not None
    assert other.valid is not None
    assert [one.valid[i].tolist() for i in range(50)] == [other.valid[i].tolist() for i in range(50)]
    assert [one.train[i].tolist() for i in range(50)] != [other.train[i].tolist() for i in range(50)]


def test_paths_are_blended_by_weight(tmp_path: Path) -> None:
    paths = [
        str(write(tmp_path / name, counting_documents([200], start)))
        for name, start in (("a", 0), ("b", 1000), ("c", 2000))
    ]
    keys = {"train_data_paths": paths, "valid_data_paths": paths[:1]}
    splits = open_datasets(config_for(**keys, train_data_weights=[6, 3, 1]))
    origin = [int(splits.train[number][0]) // 1000 for number in range(1000)]
    assert [origin.count(part) for part in range(3)] == pytest.approx([600, 300, 100], abs=1)
    assert splits.train.tokens == 600
    assert splits.valid is not None
    assert splits.valid.tokens == 200
    assert splits.test is None


def test_weights_by_documents(tmp_path: Path) -> None:
    paths = [
        str(write(tmp_path / "a", counting_documents([20] * 64))),
        str(write(tmp_path / "b", counting_documents([20] * 4, 5000))),
    ]
    for alpha, ratio in ((1.0, 16), (0.5, 4)):
        keys = {"weight_by_num_documents": True, "weighted_sampler_alpha": alpha}
        train = open_datasets(config_for(train_data_paths=paths, **keys)).train
        origin = [int(train[number][0]) >= 5000 for number in range(1700)]
        assert sum(origin) == pytest.approx(1700 / (ratio + 1), abs=1)


def test_a_batch_is_samples_side_by_side(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", counting_documents([50] * 10))
    dataset = WindowDataset(Stretch(IndexedDataset(prefix), (0, 10), 60000, "train"), 8, 3)
    batch = micro_batch(dataset, 5, 3, torch.device("cpu"))
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.shape == batch.labels.shape == (3, 8)
    assert batch.loss_mask is None
    assert torch.equal(batch.labels, batch.tokens + 1)  # the tokens count on
    assert batch.tokens[:, 0].tolist() == [int(dataset[number][0]) for number in (5, 6, 7)]
    masked = micro_batch(dataset, 5, 3, torch.device("cpu"), masked_token=int(batch.tokens[1, 2]))
    assert masked.loss_mask is not None
    assert (masked.loss_mask == 0).nonzero().tolist() == [[1, 2]]


def test_samples_of_a_file_written_by_megatron(real_data: Path) -> None:
    prefix = real_data / "megatron" / "meg-gpt2-openwebtext_text_document"
    config = config_for(data_path=str(prefix), seq_length=1024, max_position_embeddings=1024)
    splits = open_datasets(config)
    stream = np.fromfile(f"{prefix}.bin", "<u2")
    assert splits.valid is not None
    assert splits.train.tokens + splits.valid.tokens + 1 <= len(stream)
    for number in (0, 1, 10**6):
        sample = splits.train[number]
        places = np.flatnonzero(stream[: -len(sample)] == sample[0])
        assert any(np.array_equal(stream[place : place + len(sample)], sample) for place in places)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_a_document_begins_behind_an_end_token(rows: list[list[int]]) -> None:
    """Megatron's ``reset_attention_mask``: what stands behind an end-of-document token does not see it."""
    starts = document_starts(np.array(rows), 0).tolist()
    for row, found in zip(rows, starts, strict=True):
        for place, start in enumerate(found):
            assert 0 not in row[start:place]
            assert start == 0 or row[start - 1] == 0
