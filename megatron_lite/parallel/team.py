"""Work divided over ranks: the first asks, all answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_lite.config.sections.parallel import ParallelSection
from megatron_lite.parallel.context import ParallelContext, arrange
from megatron_lite.utils.errors import ConfigError

Job = Callable[[Any], Any]
"""One piece of work → its result. The tensor ranks of a replica do it together and get the same result."""


@dataclass(frozen=True)
class Asked:
    """What rank 0 asks for: the name of a job, and all pieces of it."""

    job: str
    pieces: Sequence[Any]


def arrange_replicas(context: ParallelContext, tensor_ranks: int) -> ParallelContext:
    """``context`` where ``tensor_ranks`` neighbours share a model, and the others are replicas.

    Every rank calls this, within the run's process group.

    Raises:
        ConfigError: the ranks do not divide into such models.
    """
    if context.world_size % tensor_ranks:
        raise ConfigError(
            f"{context.world_size} ranks do not divide into models on {tensor_ranks} ranks each: choose "
            "another number of ranks or model_parallel_size"
        )
    section = ParallelSection(world_size=context.world_size, model_parallel_size=tensor_ranks)
    return arrange(context, section)


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
        self._working = False

    @property
    def replicas(self) -> int:
        """How many pieces of work are done at the same time."""
        return self._context.data.size

    @contextmanager
    def led(self) -> Iterator[bool]:
        """Within: rank 0 (True) may ask, and the others (False) have done all that was asked.

        When rank 0 leaves by an error, the others end, too. Where it came in the middle of a job, which is
        all that they listen to then, they learn of it by the end of rank 0's process.
        """
        if not self._context.is_first:
            self._serve()
            yield False
            return
        try:
            yield True
        finally:
            if not self._working:
                self._context.broadcast_object(None)

    def do(self, name: str, pieces: Sequence[Any]) -> list[Any]:
        """The results of job ``name`` for ``pieces``, in their order; rank 0 asks."""
        assert self._context.is_first
        asked = Asked(name, pieces)
        self._working = True
        self._context.broadcast_object(asked)
        results = self._together(asked)
        self._working = False
        return results

    def _serve(self) -> None:
        while (asked := self._context.broadcast_object(None)) is not None:
            assert isinstance(asked, Asked)
            self._together(asked)

    def _together(self, asked: Asked) -> list[Any]:
        data, job = self._context.data, self._jobs[asked.job]
        share = asked.pieces[data.rank :: data.size]
        # None: quiet unless on a terminal. One piece has no progress to show.
        quiet = None if self._context.is_first and len(share) > 1 else True
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
