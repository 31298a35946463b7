"""Mixtures: every data set within one sample of its share, at any sample; weights from keys, and changing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import config_from_keys
from megatron_lite.config.config import Config
from megatron_lite.data import blend as blend_module
from megatron_lite.data.blend import BLOCK, LONGEST_WINDOW, Blend
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.mixture import Mixture, Phase, phase
from megatron_lite.data.samples import as_sample
from megatron_lite.utils.errors import ConfigError, DataError

SKEWED = st.lists(st.floats(-4, 2).map(lambda exponent: 10**exponent), min_size=1, max_size=30)


@settings(max_examples=40)
@given(
    weights=SKEWED,
    window=st.sampled_from([64, 512, LONGEST_WINDOW]),
    checked=st.lists(st.integers(0, 3 * BLOCK), min_size=3, max_size=3),
)
def test_a_blend_counted_out_agrees_with_its_closed_form(
    weights: list[float], window: int, checked: list[int]
) -> None:
    """Samples in order work from block to block; ``counts`` and a new blend jump there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "LONGEST_WINDOW", window)
        check_counted_out(weights, window, checked)


def bounds_of(weights: list[float], window: int) -> list[float]:
    """How far each data set may be off: 1, and if it is a rare one its share of the error of them all."""
    longest, total = max(window, 2 * len(weights)), sum(weights)
    rare = [d for d, weight in enumerate(weights) if weight * longest < total]
    bounds = [1.0] * len(weights)
    if len(rare) > 1:
        shared = [weights[d] for d in rare]
        for d, within in zip(rare, bounds_of(shared, window), strict=True):
            bounds[d] = within + weights[d] / sum(shared)
    return bounds


def check_counted_out(weights: list[float], window: int, checked: list[int]) -> None:
    blend, total, bounds = Blend(weights), sum(weights), bounds_of(weights, window)
    counts = [0] * len(weights)
    order = []
    for sample in range(3 * BLOCK + 1):
        if sample in checked:
            assert blend.counts(sample) == counts
            assert Blend(weights).counts(sample) == counts
        dataset, index = blend.locate(sample)
        assert index == counts[dataset]
        order.append((dataset, index))
        counts[dataset] += 1
        for count, weight, bound in zip(counts, weights, bounds, strict=True):
            assert abs(count - (sample + 1) * weight / total) < bound + 1e-6
    for sample in checked:
        assert Blend(weights).locate(sample) == order[sample]


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=64),
    blocks=st.integers(0, 10**9),
    length=st.integers(1, 2 * BLOCK),
)
@settings(max_examples=40)
def test_every_stretch_has_its_share_far_away(weights: list[float], blocks: int, length: int) -> None:
    first = blocks * 1009
    blend, total = Blend(weights), sum(weights)
    drawn = np.array(blend.counts(first + length)) - blend.counts(first)
    assert drawn.sum() == length
    assert np.abs(drawn - length * np.array(weights) / total).max() < 2 + 1e-2
    counted = Counter(blend.locate(first + offset)[0] for offset in range(length))
    assert [counted[dataset] for dataset in range(len(weights))] == drawn.tolist()


def test_one_rare_data_set_is_no_less_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place may come only in the last part of its window."""
    monkeypatch.setattr(blend_module, "LONGEST_WINDOW", 64)
    for rare in (1e-3, 3e-3, 7e-3):
        check_counted_out([1.0, 0.6, 0.3, rare], 10**9, [1500, 2111, 2900])


def test_rare_data_sets_come_too() -> None:
    weights = [1.0, 1e-6, 1e-6, 2e-6]
    blend = Blend(weights)
    counts = blend.counts(10_000_000)
    assert sum(counts) == 10_000_000
    assert counts[1:] == pytest.approx([10, 10, 20], abs=2)
    # A window of 10^12 samples would be looked back through if windows had no longest length.
    assert Blend([1.0, 1e-12]).counts(499_999_000_000)[1] in (0, 1)


class Numbers:
    """A data set whose sample i is [name, i]."""

    def __init__(self, name: int, size: int) -> None:
        self.name = name
        self.samples_per_epoch = size
        self.tokens = size

    def __getitem__(self, sample: int) -> np.ndarray:
        return np.array([self.name, sample])


WEIGHTS = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda weights: sum(weights) > 0.1)


@settings(max_examples=40)
@given(phases=st.lists(st.tuples(st.integers(1, 700), WEIGHTS), min_size=1, max_size=4))
def test_phases_go_on_in_each_data_set_where_it_was(phases: list[tuple[int, list[float]]]) -> None:
    starts = np.cumsum([0, *(length for length, _ in phases)]).tolist()
    parts = {str(number): Numbers(number, 100) for number in range(3)}
    plan = [phase(start, weights) for start, (_, weights) in zip(starts, phases, strict=False)]
    mixture = Mixture(parts, plan)
    seen = [0, 0, 0]
    for sample in range(starts[-1]):
        name, index = mixture[sample].tolist()
        assert index == seen[name]
        seen[name] += 1
        if sample % 97 == 0:
            assert mixture.counts(sample + 1) == seen
    assert mixture.counts(starts[-1]) == seen
    expected = sum(length * np.array(weights) / sum(weights) for length, weights in phases)
    assert np.abs(np.array(seen) - expected).max() < len(phases) + 1e-6
    assert mixture.epochs(starts[-1]) == {str(number): seen[number] / 100 for number in range(3)}


def test_weights_of_nothing() -> None:
    with pytest.raises(DataError, match="all zero"):
        phase(0, [0, 0])
    mixture = Mixture({"a": Numbers(0, 10), "b": Numbers(1, 10)}, [phase(0, [0, 2]), phase(8, [2, 0])])
    assert [int(mixture[sample][0]) for sample in range(12)] == [1] * 8 + [0] * 4
    assert mixture.phases == (Phase(0, (0, 1)), Phase(8, (1, 0)))


def write(prefix: Path, documents: int, first_token: int, length: int = 20) -> str:
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for _ in range(documents):
            writer.add(list(range(first_token, first_token + length)))
    return str(prefix)


def config_for(**keys: object) -> Config:
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
    return config_from_keys({**shape, "vocab_size": 60000, "train_iters": 1, **keys})


def shares(mixture: Mixture, samples: int = 2000) -> list[float]:
    """The share of each data set, told from the tokens of the samples."""
    drawn = Counter(int(mixture[sample][0]) // 10_000 for sample in range(samples))
    return [drawn[number] / samples for number in range(len(mixture.parts))]


def test_weights_by_the_keys(tmp_path: Path) -> None:
    sizes = {"a": 16, "b": 64, "c": 4}
    paths = [write(tmp_path / name, size, 10_000 * n) for n, (name, size) in enumerate(sizes.items())]
    by_keys = [
        ({}, [1, 1, 1]),
        ({"train_data_weights": [5, 0, 3]}, [5, 0, 3]),
        ({"weight_by_num_documents": True, "weighted_sampler_alpha": 0.5}, [4, 8, 2]),
        ({"data_temperature": 1.0}, [16, 64, 4]),
        ({"data_temperature": 2.0}, [4, 8, 2]),
        ({"data_temperature": 2.0, "train_data_weights": [9, 1, 4]}, [3, 1, 2]),
    ]
    for keys, expected in by_keys:
        train = open_datasets(config_for(train_data_paths=paths, **keys)).train
        assert shares(train) == pytest.approx([weight / sum(expected) for weight in expected], abs=1e-3)
        assert list(train.parts) == ["a", "b", "c"]


def test_gpt_neo_s_list_of_data_sets(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, 40, 10_000 * number) for number, name in enumerate("ab")]
    entries = [[paths[0], 2, "documents_fixed", 3.0], [paths[1], None, "chunks", 1.0]]
    keys = {"datasets": entries, "split": "8, 2", "tokenizer_type": "ByteTokenizer"}
    splits = open_datasets(config_for(**keys))
    assert shares(splits.train) == pytest.approx([0.75, 0.25], abs=1e-3)
    fixed, chunks = splits.train.parts.values()
    assert fixed[5].tolist() == list(range(9))  # a document's beginning
    assert chunks[1].tolist() == [*range(10_009, 10_018)]
    assert (fixed.samples_per_epoch, chunks.samples_per_epoch) == (16, 32 * 20 // 9)
    assert splits.valid is not None
    assert splits.valid.tokens == 2 * 8 * 20
    assert config_from_keys(config_for(**keys).flat()).data == config_for(**keys).data
    whole = open_datasets(config_for(**keys, valid_data_paths=[paths[0]]))
    assert whole.train.tokens == 2 * 40 * 20
    assert whole.valid is not None
    assert list(whole.valid.parts) == ["a"]
    assert whole.test is None


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mlm_training": True, "mlm_mask_id": 59_999, "mlm_random_token_prob": 0.0},
        {"fim_rate": 1.0, "fim_prefix_token": "250", "fim_middle_token": "251", "fim_suffix_token": "252"},
    ],
    ids=["text", "mlm", "fim"],
)
def test_every_mode_of_the_list_is_drawn_by_its_weight(keys: dict[str, object], tmp_path: Path) -> None:
    modes = {"windows": 4.0, "chunks": 3.0, "documents_fixed": 2.0, "documents_random": 1.0}
    paths = [write(tmp_path / mode, 40, 30 * number) for number, mode in enumerate(modes)]
    stitches = [3 if mode.startswith("documents") else None for mode in modes]
    entries = list(zip(paths, stitches, modes, modes.values(), strict=True))
    given = {"datasets": list(map(list, entries)), "split": "1", "tokenizer_type": "ByteTokenizer", **keys}
    train = open_datasets(config_for(**given)).train
    assert list(train.parts) == list(modes)
    drawn = Counter()
    changed = 0
    for number in range(400):
        sample = as_sample(train[number])
        text = sample.tokens[sample.tokens < 120]
        (origin,) = set((text // 30).tolist())
        drawn[origin] += 1
        changed += np.isin(sample.tokens, (250, 59_999)).any()
    assert [drawn[number] for number in range(4)] == [160, 120, 80, 40]
    assert changed > 200 if keys else not changed


def test_the_same_data_twice_has_two_names_and_two_orders(tmp_path: Path) -> None:
    path = write(tmp_path / "a", 40, 0)
    train = open_datasets(config_for(train_data_paths=[path, path])).train
    assert list(train.parts) == ["a", "a#2"]
    first, second = train.parts.values()
    assert [first[n].tolist() for n in range(20)] != [second[n].tolist() for n in range(20)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_path": "x", "datasets": [["y", 1, "chunks", 1.0]]}, "both name the training data"),
        ({"train_data_weights_schedule": [[5, [1, 2]]], "data_path": "x"}, "2 weights at step 5 for 1"),
        ({"train_data_weights_schedule": [[5, [1]], [5, [1]]], "data_path": "x"}, "do not grow"),
        ({"train_data_weights_schedule": [[5, [0]]], "data_path": "x"}, "weight 0 at step 5"),
        ({"weight_by_num_documents": True, "data_temperature": 2.0}, "keep one"),
        ({"datasets": [["y", 1, "chunk", 1.0]]}, "datasets"),
        ({"datasets": [["y", 0, "chunks", 1.0]]}, "datasets"),
        ({"data_temperature": 0}, "data_temperature"),
    ],
)
def test_keys_that_make_no_sense(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(**keys)
