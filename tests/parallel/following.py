"""What it means that a run follows another one, its reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layout_runs import Outcome

from megatron_lite.checkpoint import read_weights


def assert_follows(outcome: Outcome, reference: Outcome, name: str) -> None:
    """Loss and gradient norm of every step, and the evaluation loss, are the reference's."""
    assert outcome.losses == pytest.approx(reference.losses, rel=1e-5), name
    assert outcome.norms == pytest.approx(reference.norms, rel=1e-5), name
    assert outcome.eval_loss == pytest.approx(reference.eval_loss, rel=1e-5), name


def last_steps(outcome: Outcome, count: int) -> Outcome:
    """``outcome`` as a run would tell it that goes on for the last ``count`` steps."""
    return Outcome(outcome.losses[-count:], outcome.norms[-count:], outcome.eval_loss)


def assert_same_weights(checkpoint: Path, reference: Path, floor: float = 0.0) -> None:
    """Every whole tensor is the reference's within 1e-4 of its norm, plus ``floor`` for those near zero."""
    weights, expected = dict(read_weights(checkpoint)), dict(read_weights(reference))
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        assert torch.dist(weight, expected[key]) <= 1e-4 * expected[key].norm() + floor, (checkpoint, key)
