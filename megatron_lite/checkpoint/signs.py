"""Signs of life of a rank that saves or loads: who watches must know that all is well on a slow disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Sign(Protocol):
    """Told that this rank lives, and what it does from now on."""

    def __call__(self, doing: str, longer: bool = False) -> None:
        """``longer``: it waits for other ranks, each of which gives signs of its own while it works."""


def unheard(doing: str, longer: bool = False) -> None:
    """The sign of a run that nobody watches."""


class Relay:
    """The signs of a thread: they are passed on only while the rank waits for that thread."""

    def __init__(self, sign: Sign) -> None:
        self._sign = sign
        self._last = ("saving", False)
        self._is_awaited = False

    def __call__(self, doing: str, longer: bool = False) -> None:
        """A sign of the thread's; see :class:`Sign`."""
        self._last = (doing, longer)
        if self._is_awaited:
            self._sign(doing, longer)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within: the rank waits, so it does what the thread does."""
        self._is_awaited = True
        self._sign(*self._last)
        try:
            yield
        finally:
            self._is_awaited = False
