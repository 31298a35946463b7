"""The train, validation and test samples that a configuration names."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_lite.data.fill_in import FillIn
from megatron_lite.data.fingerprint import Fingerprint, fingerprint
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.masked import Masking
from megatron_lite.data.mixture import Mixture, phase
from megatron_lite.data.packing import DocumentDataset
from megatron_lite.data.remote import RemoteDataset, is_remote
from megatron_lite.data.sources import SPLITS, Source, names_of, sources_of, weigh
from megatron_lite.data.stitched import StitchedDataset
from megatron_lite.data.stretch import Stretch
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.data.transformed import Transform, TransformedDataset
from megatron_lite.data.windows import ChunkDataset, Dataset, WindowDataset
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.seeds import derive_seed

if TYPE_CHECKING:
    from megatron_lite.config import Config
    from megatron_lite.config.sections.data import DataSection

EVALUATION_SEED = 0
"""Orders validation and test samples in place of the run's seed: all runs compare on the same text."""

LOOKED_AT = 64
"""Samples of a split that are fetched before a run begins: milliseconds, even from a network disk."""


class Splits:
    """The three datasets of a run, each opened when first asked for.

    A split is None when the configuration gives it nothing: a share of zero, or no path beside
    ``train_data_paths``.

    Validation and test are shuffled too, by a fixed key: their samples 0, 1, 2, … are the same windows in
    every evaluation of every run, and the first few of them are already spread over the whole split.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._corpora: dict[str, IndexedDataset] = {}

    @cached_property
    def train(self) -> Mixture:
        """Training samples.

        Raises:
            DataError: a file is missing or damaged, or the split is too small for one sample.
        """
        dataset = self._open("train")
        if dataset is None:
            raise DataError(
                "the training split is empty: give its share of the data a positive number (key split)"
            )
        return dataset

    @cached_property
    def valid(self) -> Mixture | None:
        """Validation samples, or None. Raises as ``train`` does."""
        return self._open("valid")

    @cached_property
    def test(self) -> Mixture | None:
        """Test samples, or None. Raises as ``train`` does."""
        return self._open("test")

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

    def fingerprints(self) -> dict[str, list[Fingerprint]]:
        """By split ("train" and "valid"), the fingerprints of the data sets, in their order, then those of
        their labels."""
        files: dict[str, list[Fingerprint]] = {}
        for split in ("train", "valid"):
            sources = sources_of(self._config.data, split)
            prefixes = [source.prefix for source in sources]
            prefixes += [source.labels for source in sources if source.labels]
            files[split] = [fingerprint(self._corpus(prefix)) for prefix in prefixes]
        return files

    def _open(self, split: str) -> Mixture | None:
        """The mixture of a split; None if it has no data set, or the key ``split`` gives it no share."""
        data = self._config.data
        sources = sources_of(data, split)
        share = split_shares(data.split)[SPLITS.index(split)]
        if not sources or not (share or sources[0].is_whole):
            return None
        corpora = [self._corpus(source.prefix) for source in sources]
        parts = {
            name: self._changed(self._dataset(source, corpus, split, number), split, number)
            for number, (name, source, corpus) in enumerate(
                zip(names_of(sources), sources, corpora, strict=True)
            )
        }
        return Mixture(parts, [phase(0, weigh(data, sources, corpora))])

    def _corpus(self, prefix: str) -> IndexedDataset:
        if prefix not in self._corpora:
            self._corpora[prefix] = open_corpus(prefix, self._config.data)
        return self._corpora[prefix]

    def _dataset(self, source: Source, corpus: IndexedDataset, split: str, number: int) -> Dataset:
        """The samples of data set ``number`` of ``split``."""
        config = self._config
        vocab_size, length = config.model.vocab_size, config.model.seq_length
        assert vocab_size is not None, "prepare_data fills the vocabulary's size"
        documents = (0, corpus.document_count)
        if not source.is_whole:
            documents = document_bounds(config.data.split, corpus.document_count)[SPLITS.index(split)]
        stretch = Stretch(corpus, documents, vocab_size, split, self._labels(source, corpus))
        seed = self._seed(split, number)
        if config.data.pack_impl != "packed":
            packs, chopped = config.data.pack_impl == "pack_until_overflow", config.data.allow_chopped
            return DocumentDataset(stretch, length, seed, packs, chopped, self._tokenizer.eod_id)
        if source.mode == "chunks":
            return ChunkDataset(stretch, length)
        if source.mode == "windows":
            return WindowDataset(stretch, length, seed)
        is_random = source.mode == "documents_random"
        return StitchedDataset(stretch, length, seed, source.stitch, self._tokenizer.eod_id, is_random)

    def _changed(self, dataset: Dataset, split: str, number: int) -> Dataset:
        """Data set ``number`` of ``split`` as fill-in-the-middle or masking change it."""
        keys, vocab_size = self._config.objective, self._config.model.vocab_size
        if keys.mlm_training:
            assert vocab_size is not None
            transform: Transform = Masking.of_keys(keys, self._tokenizer, vocab_size)
        elif keys.fim_rate:
            transform = FillIn.of_keys(keys, self._tokenizer)
        else:
            return dataset
        return TransformedDataset(dataset, transform, self._seed(split, number))

    def _seed(self, split: str, number: int) -> int:
        run_seed = self._config.training.seed if split == "train" else EVALUATION_SEED
        return derive_seed(run_seed, "data", split, number)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._config.data)

    def _labels(self, source: Source, corpus: IndexedDataset) -> IndexedDataset | None:
        """The labels of ``source``, whose tokens are ``corpus``.

        Raises:
            DataError: they are not of the same documents. Both indexes are read for that, some milliseconds
                for a million documents.
        """
        if source.labels is None:
            return None
        labels = self._corpus(source.labels)
        if not np.array_equal(corpus.documents, labels.documents) or not np.array_equal(
            corpus.lengths, labels.lengths
        ):
            raise DataError(
                f"the labels {labels.name} have {labels.document_count} documents with {len(labels.tokens)} "
                f"tokens, which are not those of {corpus.name} ({corpus.document_count}, "
                f"{len(corpus.tokens)}): give the label files that were made with it"
            )
        return labels


def open_corpus(prefix: str, data: DataSection) -> IndexedDataset:
    """The token files of ``prefix``, a path or a URL. Raises DataError when they are missing or damaged."""
    if not is_remote(prefix):
        return IndexedDataset(prefix)
    cache = Path(data.data_cache_dir).expanduser() / "remote"
    return RemoteDataset(prefix, cache, int(data.data_cache_gigabytes * 1e9))


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
