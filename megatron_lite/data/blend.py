"""Which dataset gives sample *i* of a weighted blend, without a table of all samples.

Every sample is a slot, and every dataset has a queue of jobs to put into slots. Job j (from 1) of a dataset
with the share w of the weight may not come before slot ⌊(j-1)/w⌋ + 1 and must have come by slot ⌈j/w⌉: then
after any n slots the dataset has given ⌊n·w⌋ or ⌈n·w⌉ samples, less than 1 off. Taking in each slot the job
whose deadline is nearest keeps all deadlines (Steiner and Yeomans, Management Science 39, 1993: an order
with such windows exists; earliest deadline first finds it if there is one).

What was taken before a slot S has a closed form, so that any sample can be asked for at once. All jobs whose
deadline is past have come. Of the others, at most one a dataset, those with the nearest deadlines have come
as far as there was room: after no earlier slot s may more jobs have come that could not come by s than the
S - s slots that there were. (Jobs that fit into the slots up to S are the independent sets of a matroid, and
the nearest deadline first is its greedy algorithm.) That looks back no further than the longest window.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from megatron_lite.utils.errors import DataError

WEIGHT_UNITS = 1 << 40
"""Weights are held as integers that add up to about this, so that counting is exact for any n."""

LONGEST_WINDOW = 1 << 16
"""Slots between a job's first and last slot, at most: how far :meth:`Blend.counts` looks back."""

BLOCK = 1024
"""Consecutive samples that are worked out together, in some milliseconds."""


class Blend:
    """The assignment of samples 0, 1, 2, … to datasets in proportion to ``weights`` (need not add up to 1).

    After any n samples each dataset has given n·weight of them, less than 1 off. Datasets that give less than
    one sample in :data:`LONGEST_WINDOW`, if several, share one place of the blend, and are blended among
    themselves: the place is less than 1 off, of which each dataset has its share p of the place's weight, and
    less than 1 within, so that it is less than 1 + p off. (With windows as long as such a dataset needs they
    could stand beside the others, but every start would look back through all of these.)

    Raises:
        DataError: a weight is not a positive finite number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise DataError(
                    f"the weight {weight} of a dataset is not a positive number: leave the dataset out or "
                    "correct the data weights"
                )
        self.size = len(weights)
        self._window = max(LONGEST_WINDOW, 2 * self.size)
        light = [d for d, weight in enumerate(weights) if weight * self._window < total]
        if len(light) < 2:
            light = []
        heavy = [d for d in range(self.size) if d not in set(light)]
        self._datasets, self._light_datasets = heavy, light
        self._light = Blend([weights[d] for d in light]) if light else None
        places = [weights[d] for d in heavy] + ([sum(weights[d] for d in light)] if light else [])
        self._weights = [max(1, round(weight / total * WEIGHT_UNITS)) for weight in places]
        self._total = sum(self._weights)
        self._block = -1
        self._order: list[tuple[int, int]] = []
        self._after = [0] * len(places)

    def locate(self, sample: int) -> tuple[int, int]:
        """(dataset, how many earlier samples that dataset gave) for ``sample`` ≥ 0."""
        block, offset = divmod(sample, BLOCK)
        if block != self._block:
            self._work_out(block)
        place, index = self._order[offset]
        if place < len(self._datasets):
            return self._datasets[place], index
        assert self._light is not None
        dataset, index = self._light.locate(index)
        return self._light_datasets[dataset], index

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples each dataset gives."""
        places = self._given(samples)
        counts = dict(zip(self._datasets, places, strict=False))
        if self._light is not None:
            counts |= zip(self._light_datasets, self._light.counts(places[-1]), strict=True)
        return [counts[dataset] for dataset in range(self.size)]

    def _work_out(self, block: int) -> None:
        """Fill ``_order`` with (place, index) of the samples of ``block``, earliest deadline first."""
        first = block * BLOCK
        given = self._after if block == self._block + 1 else self._given(first)
        waiting: list[tuple[int, int]] = []
        ready: list[tuple[int, int]] = []
        given = list(given)
        for place, before in enumerate(given):
            waiting.append((self._release(place, before), place))
        heapq.heapify(waiting)
        order = []
        for slot in range(first + 1, first + BLOCK + 1):
            while waiting and waiting[0][0] <= slot:
                place = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (self._deadline(place, given[place]), place))
            place = heapq.heappop(ready)[1]
            order.append((place, given[place]))
            given[place] += 1
            heapq.heappush(waiting, (self._release(place, given[place]), place))
        self._block, self._order, self._after = block, order, given

    def _release(self, place: int, before: int) -> int:
        """The first slot of the job that follows ``before`` jobs of ``place``."""
        earliest = before * self._total // self._weights[place] + 1
        return max(earliest, self._deadline(place, before) - self._window)

    def _deadline(self, place: int, before: int) -> int:
        """The last slot of the job that follows ``before`` jobs of ``place``."""
        return -(-(before + 1) * self._total // self._weights[place])

    def _given(self, slots: int) -> list[int]:
        """How many jobs of each place come in the first ``slots`` slots."""
        given, ages = [], {}
        for place, weight in enumerate(self._weights):
            past = slots * weight // self._total
            given.append(past)
            age = slots - self._release(place, past)
            if age >= 0 and past * self._total < slots * weight:
                ages[place] = age
        room = self._room(slots, given, max(ages.values(), default=0))
        missing = slots - sum(given)
        for place in sorted(ages, key=lambda place: (self._deadline(place, given[place]), place)):
            if missing and (room[ages[place] :] > 0).all():
                room[ages[place] :] -= 1
                given[place] += 1
                missing -= 1
        assert missing == 0, "every slot takes a job"
        return given

    def _room(self, slots: int, past: Sequence[int], length: int) -> np.ndarray:
        """Of the last x = 1 … ``length`` of the slots: how many are left by the jobs ``past`` their deadline
        that could not come before. int64 [length]."""
        back = np.arange(1, length + 1, dtype=np.int64)
        room = back.copy()
        for weight, done in zip(self._weights, past, strict=True):
            rest = slots * weight - done * self._total
            by_window = (back * weight - rest) // self._total
            by_length = -((rest + (self._window - back) * weight) // self._total)
            room -= np.maximum(0, np.maximum(by_window, by_length))
        return room
