"""Save under one layout, go on under another: a part of what ``make switch`` does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from grid import LOSS_TOLERANCE, Layout
from switch import switches


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(tmp_path: Path) -> None:
    few = [Layout(), Layout(pp=4, zero=1), Layout(tp=2, dp=2, zero=3, sp=True)]
    for run, error, follow in switches(list(pairwise([*few, few[0]])), tmp_path):
        assert error <= LOSS_TOLERANCE, run.name
        assert follow, run.name
