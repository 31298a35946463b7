"""The shuffle is a permutation and looks random; the blend keeps its promises at every sample."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.blend import Blend
from megatron_lite.data.permutation import KeyedPermutation
from megatron_lite.utils.errors import DataError


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_every_element_comes_once(size: int, key: int) -> None:
    permutation = KeyedPermutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


@given(size=st.integers(10**9, 10**15), key=st.integers(0, 2**63 - 1), start=st.integers(0, 10**9 - 200))
def test_large_domains_keep_their_bounds_and_do_not_collide(size: int, key: int, start: int) -> None:
    permutation = KeyedPermutation(size, key)
    elements = [permutation(position) for position in range(start, start + 100)]
    assert len(set(elements)) == 100
    assert all(0 <= element < size for element in elements)


@pytest.mark.parametrize("size", [3, 4])
def test_all_orders_are_equally_likely(size: int) -> None:
    orders = list(itertools.permutations(range(size)))
    draws = 400 * len(orders)
    counts = Counter(tuple(map(KeyedPermutation(size, key), range(size))) for key in range(draws))
    chi_squared = sum((counts[order] - 400) ** 2 / 400 for order in orders)
    # Mean len - 1, standard deviation √(2·(len - 1)): five of them are far out.
    assert chi_squared < len(orders) - 1 + 5 * (2 * (len(orders) - 1)) ** 0.5


def test_neighbours_are_scattered() -> None:
    size = 10_007
    permutation = KeyedPermutation(size, 42)
    elements = [permutation(position) for position in range(size)]
    mean_step = sum(abs(left - right) for left, right in itertools.pairwise(elements)) / (size - 1)
    assert mean_step == pytest.approx(size / 3, rel=0.03)  # of two independent uniform draws
    fixed_points = sum(position == element for position, element in enumerate(elements))
    assert fixed_points < 8  # Poisson of mean 1


def test_other_keys_give_other_orders() -> None:
    first, second = KeyedPermutation(1000, 1), KeyedPermutation(1000, 2)
    assert sum(first(position) == second(position) for position in range(1000)) < 10


WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


@given(weights=WEIGHTS)
def test_each_dataset_is_read_in_order_and_to_its_weight(weights: list[float]) -> None:
    blend = Blend(weights)
    counts = [0] * len(weights)
    total = sum(weights)
    for sample in range(600):
        dataset, index = blend.locate(sample)
        assert index == counts[dataset]
        counts[dataset] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (sample + 1) * weight / total) < 1 + 1e-6  # weights are rounded


@given(weights=WEIGHTS, sample=st.integers(10**9, 10**13))
def test_the_promise_holds_far_away(weights: list[float], sample: int) -> None:
    dataset, index = Blend(weights).locate(sample)
    share = weights[dataset] / sum(weights)
    assert abs(index - sample * share) < 1 + sample * 1e-11  # weights are rounded to 2^-40


def test_two_equal_datasets_alternate() -> None:
    blend = Blend([1, 1])
    assert {blend.locate(sample)[0] for sample in (0, 1)} == {0, 1}
    assert blend.locate(1_000_000)[1] == 500_000


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(DataError, match="not a positive number"):
        Blend([1.0, weight])
