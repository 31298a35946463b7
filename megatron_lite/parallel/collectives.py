"""What ranks of one axis say to each other about activations, with the gradients that belong to it.

A *sum* turns partial values into whole ones, a *gather* turns slices into the whole; the gradient of one is
the other's or nothing at all (Shoeybi et al., arXiv 1909.08053; Korthikanti et al., arXiv 2205.05198). Slices
are of dimension 1, the sequence. ``start_...`` begins an exchange and returns the function that waits for its
result, so that others can compute meanwhile.

Bytes that a rank sends for a tensor of n bytes over t ranks: a gather to it or a scattered sum of it
n (t - 1) / t, a whole sum twice that. An exchange sends the rows that are meant for others, a message all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.parallel.context import Axis

Context = torch.autograd.function.FunctionCtx
Wait = Callable[[], torch.Tensor]


def start_sum(x: torch.Tensor, axis: Axis) -> Wait:
    """``x`` of every rank added up on every rank; overwrites ``x``."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=axis.group, async_op=True)
    return _after(work, lambda: x)


def start_gather(x: torch.Tensor, axis: Axis) -> Wait:
    """The slices ``x [b, s / size, ...]`` of every rank side by side: [b, s, ...]."""
    slices = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    work = dist.all_gather_single(slices, x.contiguous(), group=axis.group, async_op=True)
    return _after(work, lambda: slices.unflatten(0, (axis.size, -1)).transpose(0, 1).flatten(1, 2))


def start_scattered_sum(x: torch.Tensor, axis: Axis) -> Wait:
    """This rank's slice [b, s / size, ...] of the sum of every rank's ``x [b, s, ...]``."""
    slices = x.unflatten(1, (axis.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    total = x.new_empty(x.shape[0], x.shape[1] // axis.size, *x.shape[2:])
    work = dist.reduce_scatter_single(total, slices, group=axis.group, async_op=True)
    return _after(work, lambda: total)


def start_exchange(x: torch.Tensor, sent: list[int], received: list[int], axis: Axis) -> Wait:
    """Rows of ``x [n, ...]`` to where they belong: the first ``sent[0]`` to rank 0 of the axis, and so on.

    Returns those that the others sent here, ``received[r]`` from rank r, in the order of the ranks.
    """
    rows = x.new_empty(sum(received), *x.shape[1:])
    work = dist.all_to_all_single(rows, x.contiguous(), received, sent, group=axis.group, async_op=True)
    return _after(work, lambda: rows)


def start_message(x: torch.Tensor, to: int, origin: int, shape: tuple[int, ...], axis: Axis) -> Wait:
    """``x`` to the rank ``to`` of the axis; the result is the tensor of ``shape`` that comes from ``origin``.

    Every rank takes part, also one whose tensors are empty. The exchange of all ranks is one collective
    (NCCL's is the same grouped sends and receives), so that none can be left waiting for its peer.
    """
    sent, came = x.reshape(-1), x.new_empty(shape)
    counts_sent, counts_came = [0] * axis.size, [0] * axis.size
    counts_sent[to], counts_came[origin] = sent.numel(), came.numel()
    work = dist.all_to_all_single(
        came.view(-1), sent, counts_came, counts_sent, group=axis.group, async_op=True
    )
    return _after(work, lambda: came)


def _after(work: Any, result: Wait) -> Wait:
    def wait() -> torch.Tensor:
        work.wait()
        return result()

    return wait


def sum_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Partial values to their sum, on every rank; the gradient passes as it is."""
    return x if axis.size == 1 else _Sum.apply(x, axis)


def scattered_sum(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Partial values [b, s, ...] to this rank's slice of their sum; the gradient is gathered."""
    return x if axis.size == 1 else _ScatteredSum.apply(x, axis)


def shared(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """What every rank holds, as it is; each finds a share of its gradient, which are added up."""
    return x if axis.size == 1 else _Shared.apply(x, axis)


def gathered(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The whole [b, s, ...] of slices; each rank finds a share of its gradient, which are added up."""
    return x if axis.size == 1 else _Gathered.apply(x, axis)


@torch.compiler.disable
def exchanged(x: torch.Tensor, sent: list[int], received: list[int], axis: Axis) -> torch.Tensor:
    """Rows sent and received as :func:`start_exchange` says; their gradients go back."""
    return x if axis.size == 1 else _Exchanged.apply(x, sent, received, axis)


def exchanged_evenly(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``x [size, ...]``, part i for rank i, to what each rank i has for this one; gradients go back so."""
    return exchanged(x, [1] * axis.size, [1] * axis.size, axis)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return start_sum(x.clone(), axis)()

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_scattered_sum(x, axis)()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_gather(gradient, ctx.axis)(), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_sum(gradient.clone(), ctx.axis)(), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_gather(x, axis)()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_scattered_sum(gradient, ctx.axis)(), None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], axis: Axis) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return start_exchange(x, sent, received, axis)()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return start_exchange(gradient, ctx.received, ctx.sent, ctx.axis)(), None, None, None
