"""Rows of whole documents, and labels of their own, against brute force and through the model."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import Config, config_from_keys
from megatron_lite.data import permutation
from megatron_lite.data.batches import micro_batch
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.packing import DocumentDataset
from megatron_lite.data.permutation import PooledShuffle
from megatron_lite.data.samples import UNCOUNTED, Sample
from megatron_lite.data.stretch import Stretch
from megatron_lite.model import build_gpt
from megatron_lite.model.loss import token_loss
from megatron_lite.model.places import places_of
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.utils.errors import ConfigError, DataError
from megatron_lite.utils.seeds import derive_seed

PADDING = 256
CPU = torch.device("cpu")


def write(prefix: Path, documents: list[list[int]], dtype: str = "<i4") -> IndexedDataset:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    return IndexedDataset(prefix)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens count on."""
    edges = np.cumsum([0, *lengths])
    return [list(range(first, last)) for first, last in pairwise(edges.tolist())]


def config_for(**keys: object) -> Config:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16}
    rest = {"vocab_size": 300, "tokenizer_type": "ByteTokenizer", "train_iters": 1}
    return config_from_keys({**shape, **rest, "train_micro_batch_size_per_gpu": 1, **keys}, world_size=1)


def rows_by_hand(
    documents: list[list[int]], length: int, packs: bool, allow_chopped: bool
) -> list[list[list[int]]]:
    """Which (cut) documents make up each row, one document after another."""
    rows: list[list[list[int]]] = [[]]
    for document in documents:
        if len(document) > length + 1:
            if not allow_chopped:
                continue
            document = document[: length + 1]
        if len(document) < 2:
            continue
        taken = sum(len(other) - 1 for other in rows[-1])
        if rows[-1] and (not packs or taken + len(document) - 1 > length):
            rows.append([])
        rows[-1].append(document)
    return rows


def documents_in(sample: Sample) -> list[list[int]]:
    """The documents of a row again, from its tokens, labels and places."""
    assert sample.starts is not None
    counted = int((sample.labels >= 0).sum())
    assert (sample.labels[:counted] >= 0).all()
    assert (sample.tokens[counted:] == PADDING).all()
    assert (sample.starts[counted:] == counted).all()
    begins = [place for place in range(counted) if sample.starts[place] == place]
    found = []
    for first, last in pairwise([*begins, counted]):
        assert (sample.starts[first:last] == first).all()
        assert sample.tokens[first + 1 : last].tolist() == sample.labels[first : last - 1].tolist()
        found.append([*sample.tokens[first:last].tolist(), int(sample.labels[last - 1])])
    return found


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=30),
    length=st.integers(1, 12),
    packs=st.booleans(),
    allow_chopped=st.booleans(),
    chunk=st.integers(1, 40),
    pool=st.integers(1, 3),
)
def test_an_epoch_of_rows_is_every_document_once(
    lengths: list[int],
    length: int,
    packs: bool,
    allow_chopped: bool,
    chunk: int,
    pool: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    documents = numbered(lengths)
    if not any(lengths):
        return
    corpus = write(tmp_path_factory.mktemp("corpus") / "a", documents)
    stretch = Stretch(corpus, (0, len(lengths)), 60000, "train")
    stretch.tokens_per_chunk = chunk  # in truth a million: so there are several pools
    arguments = (stretch, length, 3, packs, allow_chopped, PADDING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "POOL_CHUNKS", pool)
        shuffle = PooledShuffle(len(lengths), stretch.per_chunk(len(lengths)), derive_seed(3, "documents"))
        if not rows_by_hand(documents, length, packs, allow_chopped)[0] and (
            packs or not allow_chopped or sum(lengths) < 2
        ):
            with pytest.raises(DataError, match="document"):
                DocumentDataset(*arguments)
            return
        dataset = DocumentDataset(*arguments)
    pools = [[documents[number] for number in shuffle(each)] for each in range(shuffle.pools)]
    expected = list(chain.from_iterable(rows_by_hand(each, length, packs, allow_chopped) for each in pools))
    for epoch in (0, 3):
        start = epoch * dataset.samples_per_epoch
        rows = [documents_in(dataset[start + number]) for number in range(dataset.samples_per_epoch)]
        assert sorted(row for row in rows if row) == sorted(row for row in expected if row)
        if packs or not allow_chopped:
            assert all(rows)
        if packs and allow_chopped:
            cut = [document[: length + 1] for document in documents if len(document) > 1]
            assert sorted(chain.from_iterable(rows)) == sorted(cut)


def test_neighbours_in_the_file_are_not_those_in_a_row(tmp_path: Path) -> None:
    """Nor are rows that follow each other of one place, unless the data is large: then of one pool."""
    corpus = write(tmp_path / "a", numbered([5] * 6000))
    for chunk, places in ((1 << 19, 6000), (250, 2 * 6 * 50)):  # one pool; 20 of six or more chunks
        stretch = Stretch(corpus, (0, 6000), 60000, "train")
        stretch.tokens_per_chunk = chunk
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(permutation, "POOL_CHUNKS", 6)
            dataset = DocumentDataset(stretch, 8, 3, True, True, PADDING)
        assert dataset.samples_per_epoch == 3000
        pairs = [[document[0] // 5 for document in documents_in(dataset[n])] for n in range(3000)]
        assert sorted(chain.from_iterable(pairs)) == list(range(6000))
        assert sum(abs(first - second) < 10 for first, second in pairs) < 150 * 6000 // places
        if places < 6000:
            chunks = {number // 50 for number in chain.from_iterable(pairs[:150])}
            assert len(chunks) <= 2 * 6
            assert max(chunks) - min(chunks) > 30


def test_rows_come_in_another_order_each_epoch_and_any_comes_alone(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a", numbered([5] * 400))
    arguments = (Stretch(corpus, (0, 400), 60000, "train"), 8, 3, True, True, PADDING)
    dataset = DocumentDataset(*arguments)
    assert dataset.samples_per_epoch == 200
    orders = [[int(dataset[200 * epoch + n].tokens[0]) for n in range(200)] for epoch in (0, 1)]
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 10
    assert int(DocumentDataset(*arguments)[307].tokens[0]) == orders[1][107]


@pytest.mark.parametrize("keys", [{"pos_emb": "learned"}, {"pos_emb": "rotary"}], ids=["learned", "rotary"])
def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone(
    keys: dict[str, object], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 256, size).tolist() for size in (6, 3, 9, 14, 2, 30)]
    write(tmp_path / "a", documents, "<u2")
    losses = {}
    for kind in ("pack_until_overflow", "unpacked"):
        config = config_for(data_path=str(tmp_path / "a"), split="1", pack_impl=kind, **keys)
        train = open_datasets(config).train
        model = build_gpt(config, ParameterFactory(5))
        batch = micro_batch(train, 0, train.samples_per_epoch, CPU)
        assert batch.loss_mask is not None
        places = places_of(batch.starts, 16, CPU, reset_positions=config.data.reset_position_ids)
        with torch.no_grad():
            loss = token_loss(model(batch.tokens, places=places), batch.labels) * batch.loss_mask
        losses[kind] = loss[batch.loss_mask > 0].sort().values
        alone = [torch.tensor(document[:17]) for document in documents]
    with torch.no_grad():
        expected = torch.cat([token_loss(model(d[None, :-1]), d[None, 1:])[0] for d in alone]).sort().values
    for kind, found in losses.items():
        torch.testing.assert_close(found, expected, msg=lambda text, kind=kind: f"{kind}: {text}")


def test_labels_go_with_their_tokens_in_every_kind_of_sample(tmp_path: Path) -> None:
    documents = numbered([9, 4, 30, 2, 17])
    labels = [[token if token % 3 else UNCOUNTED for token in document] for document in documents]
    write(tmp_path / "text", documents, "<u2")
    write(tmp_path / "labels", labels)
    paths = {
        "train_data_paths": [str(tmp_path / "text")],
        "train_label_data_paths": [str(tmp_path / "labels")],
    }
    for keys in (
        {},
        {"sampling_mode": "chunks"},
        {"pack_impl": "unpacked"},
        {"pack_impl": "pack_until_overflow"},
    ):
        config = config_for(**paths, **keys, seq_length=8, vocab_size=300)
        train = open_datasets(config).train
        counted = 0
        for number in range(train.samples_per_epoch):
            sample = train[number]
            assert isinstance(sample, Sample)
            wanted = sample.labels >= 0
            assert (sample.labels[wanted] == sample.tokens[wanted] + 1).all(), keys
            assert (sample.labels[wanted] % 3 > 0).all(), keys
            counted += int(wanted.sum())
        assert counted >= 20, keys
    config = config_for(**paths, seq_length=8)
    batch = micro_batch(open_datasets(config).train, 0, 4, CPU, masked_token=7)
    assert batch.loss_mask is not None
    following = batch.tokens + 1
    assert torch.equal(batch.loss_mask > 0, (following % 3 > 0) & (batch.tokens != 7))
    assert batch.labels.min() >= 0
    splits = open_datasets(config)
    assert [each.documents for each in splits.fingerprints()["train"]] == [5, 5]


def test_labels_of_other_documents_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "text", numbered([9, 4]))
    paths = {
        "train_data_paths": [str(tmp_path / "text")],
        "train_label_data_paths": [str(tmp_path / "labels")],
    }
    for lengths in ([8, 5], [9, 4, 1], [13]):
        write(tmp_path / "labels", numbered(lengths))
        with pytest.raises(DataError, match="not those of"):
            _ = open_datasets(config_for(**paths, seq_length=4)).train
    write(tmp_path / "labels", [[299] * 9, [1, 2, 3, 300]])
    with pytest.raises(DataError, match=r"labels\.bin holds the token id 300"):
        open_datasets(config_for(**paths, seq_length=4)).look_at_samples()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"train_data_paths": ["a"], "train_label_data_paths": ["b", "c"]}, "2 files for 1 train_data_paths"),
        ({"data_path": "a", "train_label_data_paths": ["b"]}, "1 files for 0 train_data_paths"),
        (
            {"train_data_paths": ["a"], "train_label_data_paths": ["b"], "sampling_mode": "documents_fixed"},
            "has no labels",
        ),
        ({"data_path": "a", "pack_impl": "unpacked", "sampling_mode": "chunks"}, "chunks cuts them"),
        ({"reset_position_ids": True}, "reset_attention_mask"),
    ],
)
def test_keys_that_do_not_agree(keys: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_for(**keys)
    assert config_for(pack_impl="unpacked").data.reset_position_ids
