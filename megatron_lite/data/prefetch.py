"""The next steps' data, prepared in the background while a step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")

STEPS_AHEAD = 2
"""Steps whose batches lie ready: one would be enough if all took as long as the average."""


def prepared_ahead(
    prepare: Callable[[A], R],
    steps: Iterable[A],
    ahead: int = STEPS_AHEAD,
    begin_thread: Callable[[], None] | None = None,
) -> Generator[R, None, None]:
    """``map(prepare, steps)``, worked out by one thread, ``ahead`` results before they are asked for.

    ``prepare`` is called in the order of ``steps`` and by one thread only, so that the results are those of
    ``map``. What it raises is raised where its result would have come. Close the generator
    (``contextlib.closing``) to end the thread; what it is at is waited for, what has not begun is dropped.

    Args:
        prepare: makes a step's data.
        steps: its arguments, one a step.
        ahead: results that may lie ready.
        begin_thread: called first in the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=begin_thread)
    pending: deque[Future[R]] = deque()
    try:
        for step in steps:
            pending.append(pool.submit(prepare, step))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
