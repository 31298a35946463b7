"""The progress line on a real (pseudo-)terminal and in a file."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from megatron_lite.metrics.progress import Progress, count, duration
from megatron_lite.utils.log import LOGGER

FIGURES = {
    "train/loss": 2.34567,
    "train/lr": 1.6e-4,
    "train/grad_norm": 0.5312,
    "speed/tokens_per_second": 12345.0,
    "speed/mfu": 0.412,
    "memory/bytes": 3.5 * 2**30,
    "valid/loss": 9.0,
}
WIDTH = 100
END = b"\x04"
"""Written after the text, which comes out of a pseudo-terminal in pieces: this is how the last is known."""


class Terminal:
    """A pseudo-terminal of WIDTH columns, and what a person would see on it."""

    def __init__(self, width: int = WIDTH) -> None:
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.stream: TextIO = os.fdopen(writer, "w")

    def screen(self) -> list[str]:
        """The lines written since the last call, by carrying out \\r, \\n and "clear to the line's end"."""
        self.stream.flush()
        os.write(self.stream.fileno(), END)
        text = b""
        while not text.endswith(END):
            text += os.read(self._reader, 1 << 16)
        lines, column = [""], 0
        for part in text.removesuffix(END).decode().replace("\x1b[K", "\0"):
            if part == "\n":
                lines.append("")
                column = 0
            elif part == "\r":
                column = 0
            elif part == "\0":
                lines[-1] = lines[-1][:column]
            else:
                lines[-1] = lines[-1][:column] + part + lines[-1][column + 1 :]
                column += 1
        return lines

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal, filters = Terminal(), list(LOGGER.filters)
    yield terminal
    LOGGER.filters[:] = filters  # a test that fails does not close its progress line
    terminal.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("megatron_lite.metrics.progress.time.monotonic", lambda: now[0])
    return now


def test_plain_lines_when_nobody_watches(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(1000, stream=stream) as progress:
        clock[0] = 20.0
        progress.update(10, FIGURES)
        progress.print("step 10  valid loss 2.5")
        clock[0] = 40.0
        progress.update(20, {"train/loss": 2.0})
    assert stream.getvalue().splitlines() == [
        "step   10/1000  loss 2.3457  lr 1.60e-04  grad 0.531  12.3k tok/s  MFU 41.2%  mem 3.50 GiB  "
        "left 33m00s",
        "step 10  valid loss 2.5",
        "step   20/1000  loss 2.0000  left 32m40s",
    ]


def test_plain_lines_on_the_terminal_of_no_width_that_openmpi_gives_its_ranks() -> None:
    terminal = Terminal(width=0)
    with Progress(100, stream=terminal.stream) as progress:
        for step in (1, 2):
            progress.update(step, {"train/loss": 10.0 - step})
    lines = terminal.screen()
    terminal.close()
    assert [line.split()[1] for line in lines[:-1]] == ["1/100", "2/100"]


def test_one_line_is_rewritten_on_a_terminal(terminal: Terminal) -> None:
    progress = Progress(100, stream=terminal.stream)
    for step in range(1, 6):
        progress.update(step, {"train/loss": 10.0 - step})
    progress.print("evaluated: 3.2")
    progress.update(6, {"train/loss": 4.0})
    progress.close()
    lines = terminal.screen()
    assert lines[0] == "evaluated: 3.2"
    assert lines[1].startswith("step   6/100  loss 4.0000")
    assert lines[2:] == [""]


def test_a_shorter_line_leaves_no_rest_and_a_long_one_does_not_wrap(terminal: Terminal) -> None:
    progress = Progress(10, stream=terminal.stream)
    progress.update(1, FIGURES)
    progress.update(2, {})
    progress.close()
    assert terminal.screen()[0].startswith("step  2/10  left")
    progress = Progress(10**9, stream=terminal.stream)
    progress.update(1, FIGURES | {"train/loss": 1e30})
    assert len(terminal.screen()[0]) == WIDTH - 1
    progress.close()


def test_the_log_does_not_break_the_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(terminal.stream)
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    monkeypatch.setattr(LOGGER, "propagate", False)
    progress = Progress(10, stream=terminal.stream)
    progress.update(1, FIGURES)
    LOGGER.warning("saved a checkpoint")
    progress.update(2, {"train/loss": 1.0})
    progress.close()
    lines = terminal.screen()
    assert lines[0] == "saved a checkpoint"
    assert lines[1].startswith("step  2/10")
    assert LOGGER.filters == []


def test_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    with Progress(10, enabled=False, stream=stream) as progress:
        progress.update(1, FIGURES)
        progress.print("text")
    assert stream.getvalue() == ""


def test_time_left_follows_the_steps_of_this_run(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(1000, step=500, stream=stream)
    clock[0] = 100.0
    progress.update(600, {})  # one second a step, 400 to go; the 500 before are not counted
    assert stream.getvalue().rstrip().endswith("left 6m40s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3599.7, "1h00m"), (7834, "2h10m"), (442800, "5d03h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (1234, "1.23k"), (12345, "12.3k"), (1.25e6, "1.25M"), (3e9, "3.00G")],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text
