"""How many bytes a rank sends to others, counted where every collective passes, by kind of parallelism.

Whoever communicates - this package, DeepSpeed, torch itself - ends in a method of ``ProcessGroup``. While a
:class:`Traffic` is open those methods count before they send; otherwise they are torch's own, untouched.

Bytes sent by a rank for a collective of a group of n ranks are those of the algorithms that send least, rings
(Patarasuk & Yuan 2009) and direct exchanges; what a rank keeps for itself is not sent:

=====================  ======================================================
sum (all-reduce)       2 (n - 1) / n of the tensor
gather (all-gather)    (n - 1) / n of the whole
scattered sum          (n - 1) / n of the whole
broadcast, reduce      (n - 1) / n of the tensor, the mean over the ranks
all-to-all             what goes to others
send                   the tensor
=====================  ======================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_lite.parallel.context import Axis, ParallelContext

KINDS = ("tensor", "sequence", "context", "expert", "data", "pipe", "control", "elsewhere")
"""See :attr:`Traffic.bytes`."""

SUM, GATHER, SCATTERED_SUM = "sum", "gather", "scattered sum"
ROOTED, EXCHANGE, SEND = "rooted", "exchange", "send"

OPERATIONS: dict[str, tuple[str, Callable[[list[Any], int, int], float]]] = {}
"""By method of ``ProcessGroup``: what it is, and (its arguments, ranks, this rank) → bytes sent."""

FEW_NUMBERS, FEW_INTEGERS = 8, 256
"""Collectives of at most so many numbers steer: norms, losses, flags, shapes, counts. They are no payload."""


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of tensors in lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors)


def _operation(kind: str, *methods: str) -> Callable[[Any], Any]:
    def register(count: Callable[[list[Any], int, int], float]) -> Any:
        OPERATIONS.update(dict.fromkeys(methods, (kind, count)))
        return count

    return register


@_operation(SUM, "allreduce", "allreduce_coalesced")
def _sum(arguments: list[Any], ranks: int, _rank: int) -> float:
    return 2 * (ranks - 1) / ranks * _bytes(arguments[0])


@_operation(ROOTED, "broadcast", "reduce")
def _from_or_to_one(arguments: list[Any], ranks: int, _rank: int) -> float:
    return (ranks - 1) / ranks * _bytes(arguments[0])


@_operation(GATHER, "allgather", "allgather_coalesced", "all_gather_single", "_allgather_base")
@_operation(GATHER, "all_gather_single_coalesced", "allgather_into_tensor_coalesced")
def _gather(arguments: list[Any], ranks: int, _rank: int) -> float:
    return (ranks - 1) * _bytes(arguments[1])


@_operation(SCATTERED_SUM, "reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base")
@_operation(SCATTERED_SUM, "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced")
def _scattered_sum(arguments: list[Any], ranks: int, _rank: int) -> float:
    return (ranks - 1) * _bytes(arguments[0])


@_operation(ROOTED, "gather")
def _to_one(arguments: list[Any], _ranks: int, _rank: int) -> float:
    outputs, inputs = arguments[:2]
    return 0 if outputs else _bytes(inputs)


@_operation(ROOTED, "scatter")
def _from_one(arguments: list[Any], ranks: int, _rank: int) -> float:
    outputs, inputs = arguments[:2]
    return (ranks - 1) * _bytes(outputs) if inputs else 0


@_operation(EXCHANGE, "all_to_all_single", "alltoall_base")
def _exchange(arguments: list[Any], ranks: int, rank: int) -> float:
    _, sent, _, split_sizes = arguments[:4]
    kept = split_sizes[rank] / max(1, len(sent)) if split_sizes else 1 / ranks
    return _bytes(sent) * (1 - kept)


@_operation(EXCHANGE, "alltoall")
def _exchange_lists(arguments: list[Any], _ranks: int, rank: int) -> float:
    return _bytes(arguments[1]) - _bytes(arguments[1][rank])


@_operation(SEND, "send")
def _send(arguments: list[Any], _ranks: int, _rank: int) -> float:
    return _bytes(arguments[0])


class Traffic:
    """While open (a context manager), counts what this rank sends; may be opened again and goes on counting.

    Attributes:
        bytes: bytes sent, by :data:`KINDS`: ``tensor`` (sums over the tensor axis), ``sequence`` (gathers and
            scattered sums over it), ``context``, ``expert``, ``data`` (gradients and ZeRO), ``pipe``,
            ``control`` (what steers), and ``elsewhere`` (between ranks that share no axis: there is nothing).
        calls: number of collectives, by method of ``ProcessGroup``.
    """

    def __init__(self, context: ParallelContext) -> None:
        self.bytes: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._context = context
        self._kinds: dict[tuple[str, str], str] = {}

    def __enter__(self) -> Self:
        # From the class itself: what getattr returns could not be put back.
        self._originals = {name: vars(dist.ProcessGroup)[name] for name in OPERATIONS}
        for name in OPERATIONS:
            setattr(dist.ProcessGroup, name, self._counting(name))
        return self

    def __exit__(self, *_error: object) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)

    def _counting(self, name: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, name)
        operation, count = OPERATIONS[name]

        def counting(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            given = [*arguments, *options.values()]
            self.calls[name] += 1
            if group.size() > 1:
                kind = "control" if _steers(given) else self._kind(operation, group)
                self.bytes[kind] += count(given, group.size(), group.rank())
            return original(group, *arguments, **options)

        return counting

    def _kind(self, operation: str, group: dist.ProcessGroup) -> str:
        key = (operation, group.group_name)
        if key not in self._kinds:
            self._kinds[key] = kind_of(self._context, operation, group)
        return self._kinds[key]


def _steers(arguments: list[Any]) -> bool:
    numbers = list(_tensors(arguments))
    count = sum(tensor.numel() for tensor in numbers)
    integers = not any(tensor.is_floating_point() for tensor in numbers)
    return count <= (FEW_INTEGERS if integers else FEW_NUMBERS)


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _tensors(each)


def kind_of(context: ParallelContext, operation: str, group: dist.ProcessGroup) -> str:
    """Which kind of parallelism an ``operation`` within ``group`` belongs to.

    Context and expert axes have groups of their own. For the others the ranks tell, since DeepSpeed makes
    groups of the same ranks for itself; point-to-point messages of a pipeline it sends within all ranks.
    """
    for kind, axis in (("context", context.context), ("expert", context.expert)):
        if axis.group is not None and axis.group.group_name == group.group_name:
            return kind
    if operation == SEND:
        return "pipe"
    ranks = set(dist.get_process_group_ranks(group))
    if ranks == _ranks(context, context.tensor):
        return "tensor" if operation == SUM else "sequence"
    if ranks <= _ranks(context, context.replicas):
        return "data"
    return "pipe" if ranks <= _ranks(context, context.pipe) else "elsewhere"


def _ranks(context: ParallelContext, axis: Axis) -> set[int]:
    """Global ranks of this rank's group along ``axis``."""
    if axis.size == 1:
        return {context.rank}
    return set(dist.get_process_group_ranks(axis.group))
