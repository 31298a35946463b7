"""Several datasets mixed by weights that may change on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lite.data.blend import Blend
from megatron_lite.data.samples import Sample, Window
from megatron_lite.data.windows import Dataset
from megatron_lite.utils.errors import DataError


@dataclass(frozen=True)
class Phase:
    """Samples from ``first_sample`` on are drawn by ``weights``, one a dataset; they add up to 1."""

    first_sample: int
    weights: tuple[float, ...]


def phase(first_sample: int, weights: Sequence[float]) -> Phase:
    """A phase with ``weights`` that need not add up to 1. Raises DataError when they are all zero."""
    total = sum(weights)
    if total <= 0:
        raise DataError(f"the weights {list(weights)} of the data sets are all zero: give one a weight")
    return Phase(first_sample, tuple(weight / total for weight in weights))


class Mixture:
    """Named datasets, mixed in proportion to the weights of the current phase; see
    :mod:`megatron_lite.data.blend`.

    A phase goes on in each dataset where the one before it stopped: no sample comes again before its dataset
    is through. A weight of zero draws nothing.

    Attributes:
        parts: the datasets by name.
        phases: in order; the first begins with sample 0.
        samples_per_epoch: the parts' samples together (a part with a high weight begins again earlier).
        tokens: the parts' tokens together.
    """

    def __init__(self, parts: Mapping[str, Dataset], phases: Sequence[Phase]) -> None:
        assert phases[0].first_sample == 0, "the first phase begins with the first sample"
        self.parts = parts
        self.phases = tuple(phases)
        self.samples_per_epoch = sum(part.samples_per_epoch for part in parts.values())
        self.tokens = sum(part.tokens for part in parts.values())
        self._datasets = list(parts.values())
        self._starts = [each.first_sample for each in phases]
        self._drawn = [[d for d, weight in enumerate(each.weights) if weight > 0] for each in phases]
        self._blends = [
            Blend([each.weights[d] for d in drawn]) for each, drawn in zip(phases, self._drawn, strict=True)
        ]
        self._before = [[0] * len(parts)]
        for start in self._starts[1:]:
            self._before.append(self.counts(start))

    def __getitem__(self, sample: int) -> Window | Sample:
        """Sample ``sample`` ≥ 0."""
        dataset, index = self.locate(sample)
        return self._datasets[dataset][index]

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the dataset, its own sample's index) for ``sample`` ≥ 0."""
        number = bisect_right(self._starts, sample) - 1
        place, index = self._blends[number].locate(sample - self._starts[number])
        dataset = self._drawn[number][place]
        return dataset, self._before[number][dataset] + index

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples each dataset gives."""
        number = max(0, bisect_right(self._starts[: len(self._before)], samples - 1) - 1)
        counts = list(self._before[number])
        given = self._blends[number].counts(samples - self._starts[number])
        for dataset, count in zip(self._drawn[number], given, strict=True):
            counts[dataset] += count
        return counts

    def epochs(self, samples: int) -> dict[str, float]:
        """By name, how often each dataset has been gone through after ``samples`` samples."""
        counts = self.counts(samples)
        return {
            name: count / part.samples_per_epoch
            for (name, part), count in zip(self.parts.items(), counts, strict=True)
        }

    def with_phases(self, phases: Sequence[Phase]) -> Mixture:
        """The same datasets, drawn by other phases."""
        return Mixture(self.parts, phases)
