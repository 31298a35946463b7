"""The train, validation and test samples that a configuration names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.windows import BlendedDataset, Dataset, WindowDataset
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.seeds import derive_seed

if TYPE_CHECKING:
    from megatron_lite.config import Config

SPLITS = ("train", "valid", "test")

EVALUATION_SEED = 0
"""Orders validation and test samples in place of the run's seed: all runs compare on the same text."""

LOOKED_AT = 64
"""Samples of a split that are fetched before a run begins: milliseconds, even from a network disk."""


class Splits:
    """The three datasets of a run, each opened when first asked for.

    A split is None when the configuration gives it nothing: a weight of zero, or no path beside
    ``train_data_paths``.

    Validation and test are shuffled too, by a fixed key: their samples 0, 1, 2, … are the same windows in
    every evaluation of every run, and the first few of them are already spread over the whole split.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    @cached_property
    def train(self) -> Dataset:
        """Training samples.

        Raises:
            DataError: a file is missing or damaged, or the split is too small for one sample.
        """
        dataset = self._open(0)
        if dataset is None:
            raise DataError(
                "the training split is empty: give its share of the data a positive number (key split)"
            )
        return dataset

    @cached_property
    def valid(self) -> Dataset | None:
        """Validation samples, or None. Raises as ``train`` does."""
        return self._open(1)

    @cached_property
    def test(self) -> Dataset | None:
        """Test samples, or None. Raises as ``train`` does."""
        return self._open(2)

    def look_at_samples(self) -> None:
        """Fetch a few training and validation samples, spread over the data, before anything is written.

        Raises:
            DataError: as ``train`` does, or a token id is not in the vocabulary (most often because the data
                was made with another tokenizer).
        """
        for dataset in (self.train, self.valid):
            if dataset is not None:
                for index in range(min(LOOKED_AT, max(1, dataset.samples_per_epoch))):
                    dataset[index]

    def _open(self, split: int) -> Dataset | None:
        data = self._config.data
        if data.train_data_paths:
            return self._open_paths(split)
        assert data.data_path is not None, "prepare_data names the data"
        corpus = IndexedDataset(data.data_path)
        if split_shares(data.split)[split] == 0:
            return None
        return self._windows(corpus, document_bounds(data.split, corpus.document_count)[split], split, 0)

    def _open_paths(self, split: int) -> Dataset | None:
        data, name = self._config.data, SPLITS[split]
        paths: Sequence[str] | None = getattr(data, f"{name}_data_paths")
        if not paths:
            return None
        weights: Sequence[float] = getattr(data, f"{name}_data_weights") or [1.0] * len(paths)
        corpora = [IndexedDataset(path) for path in paths]
        if data.weight_by_num_documents:
            weights = [corpus.document_count**data.weighted_sampler_alpha for corpus in corpora]
        parts = [
            self._windows(corpus, (0, corpus.document_count), split, number)
            for number, corpus in enumerate(corpora)
        ]
        return parts[0] if len(parts) == 1 else BlendedDataset(parts, weights)

    def _windows(
        self, corpus: IndexedDataset, documents: tuple[int, int], split: int, number: int
    ) -> WindowDataset:
        config = self._config
        assert config.model.vocab_size is not None, "prepare_data fills the vocabulary's size"
        seed = config.training.seed if split == 0 else EVALUATION_SEED
        return WindowDataset(
            corpus,
            documents,
            seq_length=config.model.seq_length,
            vocab_size=config.model.vocab_size,
            seed=derive_seed(seed, "data", SPLITS[split], number),
            split=SPLITS[split],
        )


def open_datasets(config: Config) -> Splits:
    """The datasets of ``config``, whose data paths and vocabulary ``prepare_data`` has filled."""
    return Splits(config)


def split_shares(split: str) -> tuple[float, float, float]:
    """The shares of train, validation and test in ``"969, 30, 1"`` (commas or slashes), adding up to 1.

    Raises:
        DataError: there are not one to three numbers, one is negative, or all are zero.
    """
    fields = [field for field in re.split(r"[,/]", split) if field.strip()]
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or sum(numbers) <= 0:
        raise DataError(
            f'split: "{split}" is not the shares of train, validation and test data: write three numbers '
            'such as "969, 30, 1"'
        )
    train, valid, test = numbers + [0.0] * (3 - len(numbers))
    total = train + valid + test
    return train / total, valid / total, test / total


def document_bounds(split: str, documents: int) -> list[tuple[int, int]]:
    """The (first, one past the last) document of each of the three splits; together they are all."""
    bounds = []
    first, cumulative = 0, 0.0
    for share in split_shares(split):
        cumulative += share
        last = min(documents, round(cumulative * documents))
        bounds.append((first, last))
        first = last
    return bounds
