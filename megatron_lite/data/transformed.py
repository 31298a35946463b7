"""Samples that are changed at random on their way to the model: always in the same way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_lite.data.samples import Sample, Window
from megatron_lite.data.windows import Dataset
from megatron_lite.utils.seeds import derive_seed

Transform = Callable[[Window, np.random.Generator], Window | Sample]
"""What becomes of a window, by the draws of a generator that belongs to the sample."""


class TransformedDataset:
    """``dataset``, which gives windows, with ``transform`` applied; sample i depends on ``seed``, i and the
    window. The attributes are those of ``dataset``."""

    def __init__(self, dataset: Dataset, transform: Transform, seed: int) -> None:
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self.samples_per_epoch = dataset.samples_per_epoch
        self.tokens = dataset.tokens

    def __getitem__(self, sample: int) -> Window | Sample:
        """Sample ``sample`` ≥ 0, counted through the epochs: changed anew in each."""
        window = self._dataset[sample]
        assert isinstance(window, np.ndarray), "the configuration's rules ask for windows"
        return self._transform(window, np.random.default_rng(derive_seed(self._seed, "transform", sample)))
