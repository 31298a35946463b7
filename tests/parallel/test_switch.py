"""Save under one layout, go on under another: a part of what ``make switch`` does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from grid import LOSS_TOLERANCE
from switch import different, switches


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(tmp_path: Path) -> None:
    few = different(3, most_ranks=4)
    for run, error, follow in switches(list(pairwise([*few, few[0]])), tmp_path):
        assert error <= LOSS_TOLERANCE, run.name
        assert follow, run.name
