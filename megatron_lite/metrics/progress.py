"""What a person sees while a run trains: one line, rewritten in place; plain lines when nobody watches."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from megatron_lite.utils.log import LOGGER

CLEAR_LINE = "\r\x1b[K"
SMOOTHING = 0.1
"""Weight of the newest interval in the smoothed time a step takes, which the time left is told from."""


class Progress:
    """The run's progress line.

    On a terminal the line is rewritten in place, cut at the terminal's width; :meth:`print` and the package's
    log put lines above it. Elsewhere every update is a line of its own. Use as a context manager, or
    :meth:`close` it.

    Args:
        total_steps: last step of the run.
        step: steps done before (a resumed run).
        enabled: False says nothing (ranks other than 0).
        stream: where to write; standard output if None.
    """

    def __init__(
        self, total_steps: int, step: int = 0, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._stream = stream or sys.stdout
        self._in_place = enabled and _columns(self._stream) > 0
        self._line = ""
        self._step = step
        self._time = time.monotonic()
        self._seconds_per_step = 0.0
        self._filter = _ClearFirst(self)
        if self._in_place:
            LOGGER.addFilter(self._filter)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the figures of ``step`` that are there, under the names of :mod:`megatron_lite.metrics`."""
        if not self._enabled:
            return
        line = "  ".join(_parts(step, self._total, values, self._seconds_left(step)))
        if self._in_place:
            self._line = line
            self._draw()
        else:
            self._write(line + "\n")

    def print(self, text: str) -> None:
        """Put ``text`` on a line of its own, above the progress line."""
        if self._enabled:
            self.clear()
            self._write(text + "\n")
            self._draw()

    def clear(self) -> None:
        """Wipe the progress line from the terminal, until the next update."""
        if self._in_place and self._line:
            self._write(CLEAR_LINE)

    def close(self) -> None:
        """Leave the last progress line standing."""
        LOGGER.removeFilter(self._filter)
        if self._in_place and self._line:
            self._draw()
            self._write("\n")
            self._line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _draw(self) -> None:
        if self._in_place and self._line:
            self._write(CLEAR_LINE + self._line[: _columns(self._stream) - 1])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _seconds_left(self, step: int) -> float:
        """Steps to go times the smoothed time of a step (steps since the last update count alike)."""
        now = time.monotonic()
        if step > self._step:
            newest = (now - self._time) / (step - self._step)
            kept = (1 - SMOOTHING) if self._seconds_per_step else 0.0
            self._seconds_per_step = kept * self._seconds_per_step + (1 - kept) * newest
        self._step, self._time = step, now
        return self._seconds_per_step * (self._total - step)


def _columns(stream: TextIO) -> int:
    """The width of the terminal that ``stream`` is; 0 of a file or a pipe.

    And of the pseudo-terminal that OpenMPI gives each rank, wherever its mpirun then writes the text.
    """
    return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0


class _ClearFirst(logging.Filter):
    """Wipes the progress line before a log record is written over it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def filter(self, record: logging.LogRecord) -> bool:
        self._progress.clear()
        return True


FORMATS = (
    ("train/loss", lambda value: f"loss {value:.4f}"),
    ("train/lr", lambda value: f"lr {value:.2e}"),
    ("train/grad_norm", lambda value: f"grad {value:.3f}"),
    ("speed/tokens_per_second", lambda value: f"{count(value)} tok/s"),
    ("speed/mfu", lambda value: f"MFU {value:.1%}"),
    ("memory/bytes", lambda value: f"mem {value / 2**30:.2f} GiB"),
)
"""Figures of the progress line, in order, and how each is written."""


def _parts(step: int, total: int, values: Mapping[str, float], seconds_left: float) -> list[str]:
    figures = [write(values[name]) for name, write in FORMATS if name in values]
    return [f"step {step:>{len(str(total))}}/{total}", *figures, f"left {duration(seconds_left)}"]


def count(value: float) -> str:
    """``value`` with at most four digits and a unit: 950, 12.3k, 1.25M.

    >>> count(12345)
    '12.3k'
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.{2 if value < 10 * limit else 1}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """``seconds`` in the two largest units that matter: 42s, 3m05s, 2h10m, 5d03h.

    >>> duration(7834)
    '2h10m'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02}h"
