"""Work divided over ranks: the first asks, all answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_lite.parallel.context import ParallelContext

Job = Callable[[Any], Any]
"""One piece of work → its result. The tensor ranks of a replica do it together and get the same result."""


@dataclass(frozen=True)
class Asked:
    """What rank 0 asks for: the name of a job, and all pieces of it."""

    job: str
    pieces: Sequence[Any]


class Team:
    """The replicas of a model, of which each does every so many-th piece of the work.

    Only rank 0 knows what is asked: it reads the tasks, and the others wait for work. How the work is cut
    does not depend on the number of ranks, and neither do the results.

    Args:
        context: this rank, arranged by tensor and data axis.
        jobs: by name; the same on every rank.
    """

    def __init__(self, context: ParallelContext, jobs: Mapping[str, Job]) -> None:
        self._context = context
        self._jobs = jobs

    @contextmanager
    def led(self) -> Iterator[bool]:
        """Within: rank 0 (True) may ask, and the others (False) have done all that was asked."""
        if not self._context.is_first:
            self._serve()
            yield False
            return
        try:
            yield True
        finally:
            self._context.broadcast_object(None)

    def do(self, name: str, pieces: Sequence[Any]) -> list[Any]:
        """The results of job ``name`` for ``pieces``, in their order; rank 0 asks."""
        assert self._context.is_first
        asked = Asked(name, pieces)
        self._context.broadcast_object(asked)
        return self._together(asked)

    def _serve(self) -> None:
        while (asked := self._context.broadcast_object(None)) is not None:
            assert isinstance(asked, Asked)
            self._together(asked)

    def _together(self, asked: Asked) -> list[Any]:
        data, job = self._context.data, self._jobs[asked.job]
        share = asked.pieces[data.rank :: data.size]
        quiet = None if self._context.is_first else True  # None: quiet unless on a terminal
        own = [job(piece) for piece in tqdm(share, desc=asked.job, disable=quiet, leave=False)]
        if self._context.world_size == 1:
            return own
        answers: list[Any] | None = [None] * self._context.world_size if self._context.is_first else None
        answer = (data.rank, own) if self._context.tensor.rank == 0 else None
        dist.gather_object(answer, answers, dst=0)
        results: list[Any] = [None] * len(asked.pieces)
        for rank, found in filter(None, answers or []):
            results[rank :: data.size] = found
        return results
