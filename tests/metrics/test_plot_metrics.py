"""tools/plot_metrics.py: a picture of the right curves, and clear words when there is nothing to draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_lite.metrics.plot import loss_series, plot_losses
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def run_tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "plot_metrics.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def write_metrics(path: Path, lines: list[dict[str, float | None]]) -> Path:
    path.write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))
    return path


def test_the_later_line_of_a_step_counts_and_gaps_are_left_out(tmp_path: Path) -> None:
    metrics = write_metrics(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "train/loss": 5.0},
            {"step": 2, "train/loss": 4.0},
            {"step": 3, "train/loss": None},
            {"step": 2, "train/loss": 4.5},  # resumed
            {"step": 2, "valid/loss": 4.6},
        ],
    )
    assert loss_series(metrics) == {"train/loss": {1: 5.0, 2: 4.5}, "valid/loss": {2: 4.6}}


def test_the_command_draws(tmp_path: Path) -> None:
    lines = [{"step": step, "train/loss": 10 / step, "valid/loss": 11 / step} for step in range(1, 50)]
    metrics = write_metrics(tmp_path / "metrics.jsonl", lines)
    picture = tmp_path / "new" / "loss.png"
    result = run_tool(metrics, picture, "--title", "A run")
    assert result.returncode == 0, result.stderr
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width >= 1000
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x9E, 0xCA, 0xE1), (0x08, 0x51, 0x9C)} <= colors  # both curves are there


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "train/lr": 0.1}])
    with pytest.raises(DataError, match="no losses"):
        plot_losses(metrics, tmp_path / "loss.png")
    with pytest.raises(DataError, match="must end in"):
        plot_losses(metrics, tmp_path / "loss.docx")
    assert list(tmp_path.iterdir()) == [metrics]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    result = run_tool(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "none.jsonl" in result.stderr
