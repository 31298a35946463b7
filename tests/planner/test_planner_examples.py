"""The page on choosing a layout shows what the planner computes now, and its rows are real runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.planner.examples import EXAMPLES, Example, example_config
from megatron_lite.planner.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "tools/layout_table.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_the_table_has_the_papers_bytes() -> None:
    """States of a row, from the page, against 2 + 4 + 12 bytes a parameter, divided by hand."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "choosing-a-layout.md").read_text().splitlines()
        if line.startswith(("| 2-7B", "| 20B", "| 175B"))
    ]
    assert len(rows) == len(EXAMPLES)
    states = {tuple(row[:4]): float(row[4]) for row in rows}
    parameters = {
        example.model: count_parameters(example_config(example, ROOT / "configs")) / 1e9
        for example in EXAMPLES
    }
    n = parameters["2-7B"]
    measured = states["2-7B (2.8B)", "8", "1 x 1 x 8", "1"]
    assert measured == pytest.approx(6 * n + 12 * n / 8, rel=0.01)
    # at stage 3 everything is divided, and 2 GB of weights are together at a time
    n = parameters["20B"]
    assert states["20B (20.6B)", "32", "1 x 1 x 32", "3"] == pytest.approx(18 * n / 32 + 2, rel=0.01)
    n = parameters["175B"]
    share = n / (8 * 16)  # of one replica; 4 of them share the optimizer
    assert states["175B (175.2B)", "512", "8 x 16 x 4", "1"] == pytest.approx(
        6 * share + 12 * share / 4, rel=0.1
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_row_is_a_layout_of_so_many_gpus(example: Example) -> None:
    config = example_config(example, ROOT / "configs")
    parallel = config.parallel
    stages = max(parallel.pipe_parallel_size, 1)
    assert parallel.model_parallel_size * stages * parallel.data_parallel_size == example.gpus
    assert config.batch.gradient_accumulation_steps >= stages
