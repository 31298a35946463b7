"""Learning-rate schedules against the formulas of their papers and programs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config import config_from_keys
from megatron_lite.training.run import schedule_of
from megatron_lite.training.schedule import STYLES, Schedule


def nanogpt_lr(it: int, lr: float, min_lr: float, warmup: int, decay: int) -> float:
    """nanoGPT's get_lr, the formula of the README's facts."""
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    if it > decay:
        return min_lr
    ratio = (it - warmup) / (decay - warmup)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - min_lr)


@given(step=st.integers(0, 3000), warmup=st.integers(0, 500))
def test_cosine_is_nanogpts(step: int, warmup: int) -> None:
    schedule = Schedule("cosine", peak=1e-3, minimum=1e-4, warmup=warmup, decay_end=2000)
    assert schedule.lr(step) == pytest.approx(nanogpt_lr(step, 1e-3, 1e-4, warmup, 2000), rel=1e-12)


@given(step=st.integers(0, 10_000), warmup=st.integers(1, 400))
def test_noam_has_vaswanis_shape_and_the_peak_lr(step: int, warmup: int) -> None:
    schedule = Schedule("noam", peak=3e-4, warmup=warmup)
    shape = min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)
    peak = warmup**-0.5
    assert schedule.lr(step) == pytest.approx(3e-4 * shape / peak, rel=1e-12)
    assert schedule.lr(warmup - 1) == pytest.approx(3e-4, rel=1e-12)


def test_linear_hits_its_corners_and_its_middle() -> None:
    schedule = Schedule("linear", peak=1.0, minimum=0.2, warmup=10, decay_end=110)
    assert [schedule.lr(step) for step in (10, 60, 110, 500)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_constant_stays() -> None:
    schedule = Schedule("constant", peak=0.5, warmup=4)
    assert [schedule.lr(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))]
)
def test_wsd_is_stable_and_then_falls(shape: str, middle: float) -> None:
    schedule = Schedule("wsd", 1.0, 0.0, warmup=10, decay_end=100, decay_length=20, decay_shape=shape)
    assert {schedule.lr(step) for step in range(10, 81)} == {1.0}
    assert schedule.lr(90) == pytest.approx(middle)
    assert schedule.lr(100) == pytest.approx(0.0)


def test_warmup_by_tokens_depends_on_tokens_only() -> None:
    schedule = Schedule("constant", peak=1.0, warmup_tokens=999)
    assert schedule.lr(0, tokens=0) == pytest.approx(1 / 1000)
    assert schedule.lr(3, tokens=499) == pytest.approx(0.5)
    assert schedule.lr(3, tokens=5000) == 1.0


@given(
    style=st.sampled_from(STYLES),
    warmup=st.integers(0, 50),
    length=st.integers(0, 100),
    step=st.integers(0, 300),
)
def test_rates_stay_between_zero_and_the_peak(style: str, warmup: int, length: int, step: int) -> None:
    schedule = Schedule(
        style, peak=1e-3, minimum=1e-5, warmup=warmup, decay_end=warmup + length, decay_length=length // 4
    )
    assert 0 < schedule.lr(step) <= 1e-3 * (1 + 1e-12)
    assert step < warmup or schedule.lr(step) >= 1e-5 * (1 - 1e-12)


def test_keys_become_a_schedule() -> None:
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, "vocab_size": 8}
    keys = {
        "train_iters": 320_000,
        "lr_decay_iters": 320_000,
        "warmup": 0.01,
        "lr_decay_style": "cosine",
        "min_lr": 1.6e-5,
        "optimizer": {"type": "Adam", "params": {"lr": 1.6e-4}},
    }
    schedule = schedule_of(config_from_keys(shape | keys, world_size=1))
    assert schedule.warmup == 3200
    assert schedule.lr(3200) == pytest.approx(1.6e-4)
    assert schedule.lr(320_000) == pytest.approx(1.6e-5)
