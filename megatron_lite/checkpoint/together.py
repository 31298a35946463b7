"""Ranks that succeed or fail together.

They exchange flags and sentences over all ranks' own group, or over ``group``, one of all ranks on gloo: a
thread beside the training must not use the training's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lite.checkpoint.signs import Sign, unheard
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.utils.errors import CheckpointError, UserError

T = TypeVar("T")


Group = dist.ProcessGroup | None


def together(
    context: ParallelContext,
    work: Callable[[], T],
    group: Group = None,
    sign: Sign = unheard,
    doing: str = "saving",
) -> T:
    """``work()`` on every rank; when it fails on one, every rank raises the same :class:`CheckpointError`.

    Only a flag is exchanged when all is well. A failure that is not the user's or the machine's (a defect of
    this program) is raised as it is on its own rank, with its traceback. ``sign`` is told of the work, called
    ``doing``, and of the waiting for the other ranks.
    """
    result, error = None, None
    sign(doing)
    try:
        result = work()
    except Exception as caught:
        error = caught
    sign(f"{doing}: it waits for the other ranks", longer=True)
    if largest(context, int(error is not None), group):
        sentence = _first_sentence(context, error, group)
        if error is not None and not isinstance(error, OSError | UserError):
            raise error
        raise CheckpointError(sentence) from error
    return result  # type: ignore[return-value]


def on_first_rank(
    context: ParallelContext, work: Callable[[], object], group: Group = None, sign: Sign = unheard
) -> None:
    """``work()`` on rank 0; when it fails, every rank raises the same :class:`CheckpointError`."""
    together(context, work if context.is_first else lambda: None, group, sign)


def gather_on_first(context: ParallelContext, value: T, group: Group = None) -> list[T]:
    """Every rank's ``value`` on rank 0, in the order of the ranks; an empty list on the others."""
    if context.world_size == 1:
        return [value]
    values: list[Any] | None = [None] * context.world_size if context.is_first else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def largest(context: ParallelContext, number: int, group: Group = None) -> int:
    """The largest ``number`` of any rank, on every rank."""
    if context.world_size == 1:
        return number
    flag = torch.tensor([number], device=context.device if group is None else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return int(flag.item())


def _first_sentence(context: ParallelContext, error: Exception | None, group: Group) -> str:
    """The first failing rank's message, on every rank."""
    own = None if error is None else _sentence(error)
    sentences: list[Any] = [own]
    if context.world_size > 1:
        sentences = [None] * context.world_size
        dist.all_gather_object(sentences, own, group=group)
    rank = next(number for number, sentence in enumerate(sentences) if sentence is not None)
    return sentences[rank] if context.world_size == 1 else f"{sentences[rank]} (rank {rank})"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file of the checkpoint'}: {error.strerror}"
    return str(error) or repr(error)
