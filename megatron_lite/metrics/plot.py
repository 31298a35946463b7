"""A run's loss curves as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_lite.metrics.jsonl import read_jsonl
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

SERIES = (("train/loss", "training", "#9ecae1", ""), ("valid/loss", "validation", "#08519c", "o"))
"""Figure, name in the legend, colour, marker."""

FORMATS = (".png", ".svg", ".pdf")


def loss_series(metrics: Path) -> dict[str, dict[int, float]]:
    """For each figure of :data:`SERIES` its finite values by step; a step's last line counts.

    Raises:
        DataError: the file has neither, or is no metrics file.
    """
    series: dict[str, dict[int, float]] = {name: {} for name, *_ in SERIES}
    for line in read_jsonl(metrics):
        for name, values in series.items():
            value = line.get(name)
            if value is not None and math.isfinite(value):
                values[line["step"]] = value
    if not any(series.values()):
        raise DataError(f"{metrics} has no losses yet: give the metrics.jsonl of a run that has taken steps")
    return series


def plot_losses(metrics: Path, picture: Path, title: str = "") -> None:
    """Draw training and validation loss of ``metrics`` (a metrics.jsonl) against the step into ``picture``.

    Raises:
        DataError: there are no losses, or ``picture`` has another ending than :data:`FORMATS`.
    """
    if picture.suffix.lower() not in FORMATS:
        raise DataError(
            f"{picture} must end in one of {', '.join(FORMATS)}: that chooses the picture's format"
        )
    series = loss_series(metrics)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, color, marker in SERIES:
        points = sorted(series[name].items())
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(
                steps,
                losses,
                color=color,
                linewidth=1.6,
                label=f"{label}, last {losses[-1]:.3f}",
                marker=marker,
                markersize=3.5,
            )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:].lower())
