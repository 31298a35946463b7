"""Fill-in-the-middle and masked language modelling: what they keep, how often they act, and in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.fill_in import FillIn
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.masked import Masking
from megatron_lite.data.samples import UNCOUNTED, Sample
from megatron_lite.data.transformed import TransformedDataset
from megatron_lite.utils.errors import ConfigError, DataError

PREFIX, SUFFIX, MIDDLE, EOD, SEPARATOR = 1000, 1001, 1002, 1003, 1004
SENTINELS = (PREFIX, SUFFIX, MIDDLE)


def fill_in(rate: float = 1.0, spm_rate: float = 0.5, **more: object) -> FillIn:
    return FillIn(rate, spm_rate, PREFIX, SUFFIX, MIDDLE, EOD, **more)  # type: ignore[arg-type]


def put_back(piece: list[int]) -> list[int]:
    """A rearranged piece as it was before, from the definition of the two forms."""
    suffix, middle = piece.index(SUFFIX), piece.index(MIDDLE)
    assert piece[0] == PREFIX
    if suffix > 1:
        return piece[1:suffix] + piece[middle + 1 :] + piece[suffix + 1 : middle]
    return piece[middle + 1 :] + piece[suffix + 1 : middle]


@given(
    piece=st.lists(st.integers(0, 900), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
    spm=st.booleans(),
)
def test_a_rearranged_piece_has_the_same_tokens_and_can_be_put_back(
    piece: list[int], seed: int, spm: bool
) -> None:
    rearrange = fill_in(spm_rate=float(spm))
    found = rearrange.rearranged(np.array(piece), np.random.default_rng(seed)).tolist()
    assert Counter(found) == Counter(piece) + Counter(SENTINELS)
    marks = [token for token in found if token in SENTINELS]
    assert marks == [PREFIX, SUFFIX, MIDDLE]
    assert (found[1] == SUFFIX) if spm else True
    assert put_back(found) == piece


@given(
    window=st.lists(st.integers(0, 900) | st.sampled_from([EOD, SEPARATOR]), min_size=2, max_size=60),
    rate=st.floats(0, 1),
    separator=st.none() | st.just(SEPARATOR),
    seed=st.integers(0, 2**32),
)
def test_a_window_keeps_its_documents_apart_in_order(
    window: list[int], rate: float, separator: int | None, seed: int
) -> None:
    change = fill_in(rate, separator=separator)
    found = change(np.array(window), np.random.default_rng(seed))
    assert found.dtype == np.int64
    assert len(found) == len(window)
    rows = []
    for tokens in (window, found.tolist()):
        documents: list[list[int]] = [[]]
        for token in tokens:
            if token == EOD:
                documents.append([])
            else:
                documents[-1].append(token)
        rows.append(documents)
    before, after = rows
    assert len(after) <= len(before), "no document is added"
    for whole, changed in zip(before, after[:-1], strict=False):  # the last one is cut off
        kept = Counter(token for token in changed if token not in SENTINELS)
        assert kept == Counter(whole)
    if rate == 0:
        assert found.tolist() == window


def test_how_often_documents_and_fragments_are_rearranged() -> None:
    document = [*range(7), EOD]
    random = np.random.default_rng(1)
    change = fill_in(0.7, 0.2)
    windows = [change(np.array(document * 20), random).tolist() for _ in range(400)]
    heads = [window[: len(window) - window[::-1].index(EOD)] for window in windows]  # whole documents
    rearranged = sum(head.count(PREFIX) for head in heads)
    seen = sum(head.count(EOD) for head in heads)
    assert rearranged / seen == pytest.approx(0.7, abs=0.03)
    spm = sum(
        head[place + 1] == SUFFIX for head in heads for place in range(len(head) - 1) if head[place] == PREFIX
    )
    # one PSM piece in eight or so has an empty prefix, and looks the same
    assert 0.2 < spm / rearranged < 0.45
    fragments = [0, 1, 2, SEPARATOR, 3, 4, 5, 6, SEPARATOR, 7, 8, 9]
    change = fill_in(1.0, separator=SEPARATOR, fragment_rate=0.25)
    count = 0
    for _ in range(2000):
        found = change(np.array([*fragments, *[EOD] * 10]), random).tolist()
        pieces = " ".join(map(str, found[: found.index(EOD)])).split(str(SEPARATOR))
        assert len(pieces) == 3, "separators stay where they are"
        for piece, whole in zip(pieces, ([0, 1, 2], [3, 4, 5, 6], [7, 8, 9]), strict=True):
            tokens = [int(token) for token in piece.split()]
            count += PREFIX in tokens
            assert sorted(token for token in tokens if token < 1000) == whole
    assert count / 6000 == pytest.approx(0.25, abs=0.03)


MASK, CLS = 500, 501


def masking(**keys: object) -> Masking:
    shares = {"rate": 0.15, "same": 0.1, "random": 0.1, "mask_id": MASK, "cls_id": None}
    return Masking(**{**shares, "ignored": (7, MASK, CLS), "vocab_size": 502, **keys})  # type: ignore[arg-type]


@given(
    window=st.lists(st.integers(0, 499), min_size=2, max_size=80),
    rate=st.floats(0, 0.99),
    same=st.floats(0, 0.5),
    random=st.floats(0, 0.5),
    with_cls=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_labels_are_the_chosen_tokens_in_their_places(
    window: list[int], rate: float, same: float, random: float, with_cls: bool, seed: int
) -> None:
    mask = masking(rate=rate, same=same, random=random, cls_id=CLS if with_cls else None)
    sample = mask(np.array(window), np.random.default_rng(seed))
    text = np.array([*([CLS] if with_cls else []), *window])[: len(window) - 1]
    assert sample.tokens.shape == sample.labels.shape == text.shape
    chosen = sample.labels >= 0
    assert (sample.labels[chosen] == text[chosen]).all()
    assert (sample.tokens[~chosen] == text[~chosen]).all(), "what is not to be found stays"
    assert not np.isin(text[chosen], (7, MASK, CLS)).any()
    hidden = sample.tokens == MASK
    assert (chosen | ~hidden).all()
    others = chosen & ~hidden & (sample.tokens != text)
    assert not np.isin(sample.tokens[others], (7, MASK, CLS)).any()


def test_rates_are_those_of_bert() -> None:
    text = np.random.default_rng(0).integers(8, 500, 400_001)
    sample = masking()(text, np.random.default_rng(1))
    chosen = sample.labels != UNCOUNTED
    assert chosen.mean() == pytest.approx(0.15, abs=0.002)
    tokens, labels = sample.tokens[chosen], sample.labels[chosen]
    assert (tokens == MASK).mean() == pytest.approx(0.8, abs=0.005)
    assert (tokens == labels).mean() == pytest.approx(0.1 + 0.1 / 499, abs=0.005)
    drawn = tokens[(tokens != MASK) & (tokens != labels)]
    counts = np.bincount(drawn, minlength=502)
    assert np.flatnonzero(counts == 0).tolist() == [7, MASK, CLS], "any other id is drawn"
    assert counts.max() < 40


def config_for(prefix: Path, **keys: object) -> Config:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16}
    rest = {"vocab_size": 300, "tokenizer_type": "ByteTokenizer", "train_iters": 1, "split": "5, 5"}
    return config_from_keys(
        {**shape, **rest, "train_micro_batch_size_per_gpu": 1, "data_path": str(prefix), **keys}, world_size=1
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("corpus") / "a"
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for size in random.integers(5, 60, 200):
            writer.add([*random.integers(0, 250, size).tolist(), 256])
    return prefix


@pytest.mark.parametrize(
    "keys",
    [
        {"fim_rate": 0.9, "fim_prefix_token": "250", "fim_middle_token": "251", "fim_suffix_token": "252"},
        {"mlm_training": True, "mlm_mask_id": 299, "mlm_cls_token_id": 298},
    ],
    ids=["fim", "mlm"],
)
def test_samples_depend_on_the_seed_and_their_number_alone(keys: dict[str, object], corpus: Path) -> None:
    def text(sample: object) -> tuple[list[int], ...]:
        if isinstance(sample, Sample):
            return sample.tokens.tolist(), sample.labels.tolist()
        assert isinstance(sample, np.ndarray)
        return (sample.tolist(),)

    splits = open_datasets(config_for(corpus, **keys, seed=3))
    plain = open_datasets(config_for(corpus, seed=3)).train
    train = splits.train
    numbers = range(train.samples_per_epoch)
    samples = [text(train[number]) for number in numbers]
    again = open_datasets(config_for(corpus, **keys, seed=3))
    assert [text(again.train[number]) for number in reversed(numbers)] == samples[::-1]
    assert text(plain[0]) != samples[0]
    other = open_datasets(config_for(corpus, **keys, seed=4))
    assert [text(other.train[number]) for number in numbers] != samples
    assert splits.valid is not None
    assert other.valid is not None
    assert text(splits.valid[3]) == text(other.valid[3]), "validation is the same for all seeds"


class OneWindow:
    """A data set whose samples are all the same."""

    samples_per_epoch = 1
    tokens = 4

    def __getitem__(self, sample: int) -> np.ndarray:
        return np.arange(4)


def test_the_same_window_is_changed_anew_each_time() -> None:
    """Epoch after epoch; by draws that look uniform, and belong to the seed and the sample."""

    def drawn(seed: int) -> list[list[int]]:
        dataset = TransformedDataset(OneWindow(), lambda window, random: window + random.integers(10), seed)
        return [np.asarray(dataset[sample]).tolist() for sample in (*range(500), 7)]

    samples = drawn(3)
    assert samples[-1] == samples[7]
    assert all(25 < samples.count(list(range(n, n + 4))) < 80 for n in range(10))
    assert sum(map(list.__eq__, samples, drawn(4))) < 90


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"mlm_training": True}, "needs mlm_mask_id"),
        ({"mlm_training": True, "mlm_mask_id": 1, "fim_rate": 0.5}, "do not go together"),
        ({"fim_rate": 0.5, "pack_impl": "unpacked"}, "pack_impl unpacked gives rows of whole documents"),
        (
            {
                "data_path": None,
                "train_data_paths": ["a"],
                "train_label_data_paths": ["b"],
                "mlm_training": True,
                "mlm_mask_id": 1,
            },
            "mlm_training changes windows of text, which the labels of train_label_data_paths",
        ),
        (
            {
                "mlm_training": True,
                "mlm_mask_id": 1,
                "mlm_same_token_prob": 0.6,
                "mlm_random_token_prob": 0.5,
            },
            "more than 1",
        ),
        ({"mlm_training": True, "mlm_mask_id": 1, "causal": True}, "causal: true hides one"),
        ({"causal": False}, "set mlm_training"),
    ],
)
def test_keys_that_do_not_agree(keys: dict[str, object], reason: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_for(corpus, **keys)


def test_ids_that_do_not_exist_are_named(corpus: Path) -> None:
    with pytest.raises(DataError, match="has the id 300, outside the vocabulary of 300"):
        _ = open_datasets(config_for(corpus, mlm_training=True, mlm_mask_id=300)).train
    with pytest.raises(DataError, match=r"fim_prefix_token: '<\|fim_prefix\|>' is not one token"):
        _ = open_datasets(config_for(corpus, fim_rate=0.5)).train
