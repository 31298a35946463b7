"""The lengths of documents as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_lite.data.inspection import Lengths
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

FORMATS = (".png", ".svg", ".pdf")


def check_picture(picture: Path) -> None:
    """Raise DataError unless ``picture`` ends in one of :data:`FORMATS`."""
    if picture.suffix.lower() not in FORMATS:
        raise DataError(
            f"{picture} must end in one of {', '.join(FORMATS)}: that chooses the picture's format"
        )


def plot_lengths(lengths: Lengths, picture: Path, title: str) -> None:
    """Draw how many documents there are of which length (bars double in length) into ``picture``.

    Raises:
        DataError: ``picture`` has another ending than :data:`FORMATS`.
    """
    check_picture(picture)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts, edges = lengths.histogram
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = np.arange(len(counts))
    axes.bar(places, counts, width=0.9, color="#08519c")
    axes.set_xticks(places, [bar_name(*edges[place : place + 2].tolist()) for place in places], rotation=45)
    axes.axvline(
        float(np.interp(np.median(lengths.tokens), edges, np.arange(len(edges)))) - 0.5,
        color="#e6550d",
        label=f"median {np.median(lengths.tokens):,.0f}",
    )
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.set_title(title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:].lower())


def bar_name(first: int, end: int) -> str:
    """The lengths from ``first`` up to ``end``, in few characters."""
    return str(first) if end == first + 1 else f"{short(first)}-{short(end)}"


def short(number: int) -> str:
    """A power of two with Ki, Mi, Gi."""
    for factor, unit in ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if number >= factor:
            return f"{number // factor}{unit}"
    return str(number)
