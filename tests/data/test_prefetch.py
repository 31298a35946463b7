"""Batches prepared in the background are those of the foreground; errors and threads end in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from megatron_lite.data.prefetch import prepared_ahead


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_the_results_are_those_of_map_by_one_thread() -> None:
    callers, begun = set(), []

    def square(number: int) -> int:
        callers.add(threading.current_thread().name)
        return number * number

    with closing(prepared_ahead(square, range(200), 3, lambda: begun.append(1))) as results:
        assert list(results) == [number * number for number in range(200)]
    assert len(callers) == len(begun) == 1
    assert threading.current_thread().name not in callers
    assert loaders() == []


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_it_goes_ahead_so_far_and_no_further(ahead: int) -> None:
    prepared: list[int] = []
    asked: list[int] = []

    def steps() -> Iterator[int]:
        for number in range(50):
            asked.append(number)
            yield number

    with closing(prepared_ahead(lambda number: prepared.append(number) or number, steps(), ahead)) as results:
        for expected in range(20):
            assert next(results) == expected
            assert len(asked) == expected + 1 + ahead
            assert len(prepared) <= expected + 1 + ahead
    assert prepared == list(range(len(prepared)))
    assert len(prepared) <= 20 + ahead
    assert loaders() == []


def test_while_a_step_runs_the_next_is_prepared() -> None:
    second_is_ready = threading.Event()

    def prepare(number: int) -> int:
        if number == 1:
            second_is_ready.set()
        return number

    with closing(prepared_ahead(prepare, range(3))) as results:
        next(results)
        assert second_is_ready.wait(300)


def test_an_error_comes_where_the_result_would_have_come() -> None:
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise ValueError("no such sample")
        return number

    with closing(prepared_ahead(fail_at_three, range(10), 2)) as results:
        assert [next(results), next(results), next(results)] == [0, 1, 2]
        with pytest.raises(ValueError, match="no such sample"):
            next(results)
    assert loaders() == []


def test_the_thread_ends_with_the_block_that_failed() -> None:
    def train() -> None:
        with closing(prepared_ahead(lambda number: number, range(10**9))) as results:
            next(results)
            raise RuntimeError("in training")

    with pytest.raises(RuntimeError, match="in training"):
        train()
    assert loaders() == []
