"""Which data sets a configuration names for a split, how they are sampled and how they are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from megatron_lite.data.indexed import IndexedDataset

if TYPE_CHECKING:
    from megatron_lite.config.sections.data import DataSection

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Source:
    """One data set of a split.

    Attributes:
        prefix: of the token files.
        mode: how samples are cut, a value of the key ``sampling_mode``.
        stitch: documents that make a sample, for the modes that cut samples out of documents.
        weight: how often to draw from it, beside the other data sets; None when that is not said.
        is_whole: all its documents belong to the split; else the key ``split`` divides them.
        labels: prefix of its label files; None: every next token is a label.
    """

    prefix: str
    mode: str
    stitch: int
    weight: float | None
    is_whole: bool
    labels: str | None = None


def sources_of(data: DataSection, split: str) -> list[Source]:
    """The data sets of ``split`` ("train", "valid" or "test"), in order.

    ``{split}_data_paths`` come first. Without ``train_data_paths`` the training data are ``datasets`` or
    ``data_path``, and if there are no paths for validation and test, these are parts of the same data.
    """
    paths: Sequence[str] = getattr(data, f"{split}_data_paths") or []
    weights: Sequence[float | None] = getattr(data, f"{split}_data_weights") or [None] * len(paths)
    labels: Sequence[str | None] = getattr(data, f"{split}_label_data_paths") or [None] * len(paths)
    if paths or data.train_data_paths:
        return [
            Source(path, data.sampling_mode, data.stitch, weight, is_whole=True, labels=label)
            for path, weight, label in zip(paths, weights, labels, strict=True)
        ]
    has_own = bool(data.valid_data_paths or data.test_data_paths)
    if has_own and split != "train":
        return []
    if data.datasets:
        return [
            Source(prefix, mode, stitch or 1, weight, is_whole=has_own)
            for prefix, stitch, mode, weight in data.datasets
        ]
    if data.data_path:
        return [Source(data.data_path, data.sampling_mode, data.stitch, None, is_whole=has_own)]
    return []


def weigh(data: DataSection, sources: Sequence[Source], corpora: Sequence[IndexedDataset]) -> list[float]:
    """How often to draw from each of ``sources``, whose files are ``corpora``.

    - ``weight_by_num_documents``: the documents to the power ``weighted_sampler_alpha`` (Conneau et al.,
      arXiv 1911.02116);
    - ``data_temperature`` T: the weights given, or the tokens if none are, to the power 1/T (Devlin et al.'s
      multilingual BERT; Xue et al., arXiv 2010.11934);
    - else the weights given, or equally.
    """
    if data.weight_by_num_documents:
        return [corpus.document_count**data.weighted_sampler_alpha for corpus in corpora]
    if data.data_temperature is None:
        return [1.0 if source.weight is None else source.weight for source in sources]
    weights = [
        float(len(corpus.tokens)) if source.weight is None else source.weight
        for source, corpus in zip(sources, corpora, strict=True)
    ]
    return [weight ** (1 / data.data_temperature) for weight in weights]


def names_of(sources: Sequence[Source]) -> list[str]:
    """A short name for each source: the last part of its path, made unique by a number."""
    names: list[str] = []
    for source in sources:
        name = PurePosixPath(source.prefix).name
        number = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{number + 1}" if number else name)
    return names
