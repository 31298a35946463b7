"""The batch-size ramp against a simulation that counts step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.training.batch_ramp import plan_batches
from megatron_lite.utils.errors import ConfigError


@given(
    start=st.integers(1, 6),
    increment=st.integers(1, 4),
    growth=st.integers(0, 5),
    tokens=st.integers(1, 20_000),
    quantum=st.integers(1, 4),
)
def test_closed_form_equals_counting(
    start: int, increment: int, growth: int, tokens: int, quantum: int
) -> None:
    seq_length = 16
    start, increment = start * quantum, increment * quantum
    full = start + growth * increment
    plan = plan_batches(full, seq_length, [start, increment, tokens], quantum)
    samples = 0
    for step in range(120):
        batch = plan.batch(samples)
        crossed = (
            samples * seq_length * growth // tokens if growth else 0
        )  # whole stretches of tokens behind us
        assert batch == min(full, start + crossed * increment)
        assert batch % quantum == 0
        assert plan.samples(step) == samples
        assert plan.tokens(step) == samples * seq_length
        samples += batch


def test_no_ramp_is_a_constant() -> None:
    plan = plan_batches(12, 100, None, 4)
    assert (plan.batch(0), plan.samples(7), plan.tokens(7)) == (12, 84, 8400)


@pytest.mark.parametrize(
    ("full", "ramp", "names"),
    [
        (32, [6, 4, 1000], "start = 6"),
        (32, [8, 6, 1000], "increment = 6"),
        (32, [8, 16, 1000], "32"),
        (8, [16, 8, 1000], "16"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(full: int, ramp: list[int], names: str) -> None:
    with pytest.raises(ConfigError, match="rampup_batch_size") as error:
        plan_batches(full, 16, ramp, 4)
    assert names in str(error.value)
