"""Rate, share done and time left on standard error."""

from __future__ import annotations

import sys
import time

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 10.0
"""Least time between two lines: on a terminal, where the line is rewritten, and elsewhere."""


class Progress:
    """Prints a line at intervals.

    Args:
        total: bytes of input on disk, 0 if not known.
        num_docs: documents in the input, if known; the time left then follows from them.
        log_interval: documents between lines, at least.
        done: bytes, documents and tokens that an earlier run has done.
    """

    def __init__(
        self, total: int, num_docs: int | None, log_interval: int, done: tuple[int, int, int]
    ) -> None:
        self._total = total
        self._num_docs = num_docs
        self._log_interval = log_interval
        self._first = done
        self._terminal = sys.stderr.isatty()
        self._start = self._last_time = time.monotonic()
        self._last_documents = done[1]

    def update(self, position: int, documents: int, tokens: int) -> None:
        """Print if it is time; ``position`` in bytes of all inputs."""
        now = time.monotonic()
        due = now - self._last_time >= (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        if due and documents - self._last_documents >= self._log_interval:
            self._last_time, self._last_documents = now, documents
            self.write(self._line(position, documents, tokens, now - self._start))

    def _line(self, position: int, documents: int, tokens: int, seconds: float) -> str:
        first_position, first_documents, _ = self._first
        line = self.rates(position, documents, tokens)
        if self._num_docs:
            new, left = documents - first_documents, self._num_docs - documents
            share = documents / self._num_docs
        else:
            new, left = position - first_position, self._total - position
            share = position / self._total if self._total else 0.0
        if share and new:
            line += f", {min(1.0, share):.0%}, {max(0, left) * seconds / new:.0f} s left"
        return line

    def rates(self, position: int, documents: int, tokens: int) -> str:
        """What is done and how fast."""
        seconds = max(1e-9, time.monotonic() - self._start)
        first_position, _, first_tokens = self._first
        return (
            f"{documents:,} documents, {tokens:,} tokens, "
            f"{(position - first_position) / seconds / 1e6:.1f} MB/s, "
            f"{(tokens - first_tokens) / seconds / 1e6:.2f} M tokens/s"
        )

    def say(self, line: str) -> None:
        """Print ``line`` for good."""
        print(f"\r{line:<100}" if self._terminal else line, file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print ``line``, to be rewritten on a terminal."""
        if self._terminal:
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        else:
            self.say(line)
