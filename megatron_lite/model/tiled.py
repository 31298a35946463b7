"""Attention tile by tile: over documents and windows, and over keys that other ranks send.

The outputs of the tiles that a query is in are averaged by their sums of exponentials, which is exact: it is
how flash attention itself goes through the keys (Milakov and Gimelshein, arXiv 1805.02867; Liu et al., arXiv
2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lite.model.places import Documents, Places
from megatron_lite.model.tile_kernels import Drawn, tile_kernel
from megatron_lite.model.tiles import Step, ring_plan, whole_plan
from megatron_lite.parallel.collectives import start_message
from megatron_lite.parallel.context import ALONE, Axis
from megatron_lite.utils.seeds import derive_seed

Wait = Callable[[], torch.Tensor]


@torch.compiler.disable
def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    causal: bool,
    window: int | None,
    documents: Documents | None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, where each token sees of its document what ``causal`` and ``window`` say.

    ``q [b, heads, s, d]``, ``k`` and ``v [b, kv_heads, s, d]`` → [b, heads, s, d]; the scale is 1 / √d
    unless it is given. Kept for the backward: these, the output, and a number for each head and query.
    """
    plan = whole_plan(q.shape[2], documents.bounds if documents else None, window, causal)
    return _TiledAttention.apply(q, k, v, plan, scale, dropout, _seed(dropout), ALONE)


@torch.compiler.disable
def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    causal: bool,
    window: int | None,
    places: Places,
    scale: float | None = None,
) -> torch.Tensor:
    """The same by the ranks that share sequences, each with the tokens that ``places.context`` gives it."""
    axis = places.context.axis
    bounds = places.documents.bounds if places.documents else None
    plan = ring_plan(places.length, axis.size, axis.rank, bounds, window, causal)
    return _TiledAttention.apply(q, k, v, plan, scale, dropout, _seed(dropout), axis)


def _seed(dropout: float) -> int:
    return int(torch.randint(2**62, ())) if dropout else 0


class _TiledAttention(torch.autograd.Function):
    """Keys of the next step travel while this step's tiles are computed, their gradients back likewise."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: tuple[Step, ...],
        scale: float | None,
        dropout: float,
        seed: int,
        axis: Axis,
    ) -> torch.Tensor:
        kernel, exact = tile_kernel(q, dropout), torch.promote_types(q.dtype, torch.float32)
        merges = any(not tile.diagonal for step in plan for tile in step.tiles)
        out = torch.empty(q.shape, dtype=exact if merges else q.dtype, device=q.device)
        log = torch.empty(q.shape[:3], dtype=exact, device=q.device)
        drawn: list[Drawn] = []
        came: Wait | None = None
        for number, step in enumerate(plan):
            at_hand = (k, v) if came is None else came().unbind()
            came = _start_keys(k, v, plan[number + 1], axis) if number + 1 < len(plan) else None
            for tile in step.tiles:
                rows, queries, keys = tile.rows, tile.queries, tile.keys
                own, part = (rows, slice(None), queries), (rows, slice(None), keys)
                own_seed = derive_seed(seed, "tile", len(drawn)) if dropout else 0
                more, more_log, source = kernel.forward(
                    q[own], at_hand[0][part], at_hand[1][part], tile.shape, scale, dropout, own_seed
                )
                drawn.append(source)
                if tile.diagonal:
                    out[own], log[own] = more, more_log
                else:
                    _merge(out[own], log[own], more, more_log)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log)
        ctx.plan, ctx.scale, ctx.dropout, ctx.drawn, ctx.axis = plan, scale, dropout, drawn, axis
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log = ctx.saved_tensors
        kernel, plan, axis = tile_kernel(q, ctx.dropout), ctx.plan, ctx.axis
        grad_q = torch.zeros(q.shape, dtype=log.dtype, device=q.device)
        totals = torch.zeros(2, *k.shape, dtype=log.dtype, device=q.device)
        drawn = iter(ctx.drawn)
        came: Wait | None = None
        back: Wait | None = None
        for number, step in enumerate(plan):
            at_hand = (k, v) if came is None else came().unbind()
            came = _start_keys(k, v, plan[number + 1], axis) if number + 1 < len(plan) else None
            found = (
                totals if number == 0 else torch.zeros(2, *at_hand[0].shape, dtype=log.dtype, device=q.device)
            )
            for tile in step.tiles:
                rows, queries, keys = tile.rows, tile.queries, tile.keys
                own, part = (rows, slice(None), queries), (rows, slice(None), keys)
                dq, dk, dv = kernel.backward(
                    gradient[own], q[own], at_hand[0][part], at_hand[1][part], out[own], log[own], tile.shape,
                    ctx.scale, ctx.dropout, next(drawn),
                )  # fmt: skip
                grad_q[own] += dq
                found[0][part] += dk
                found[1][part] += dv
            if back is not None:
                totals[..., plan[number - 1].sent, :] += back()
            if number:
                back = _start_gradients(found.to(k.dtype), step, axis)
        if back is not None:
            totals[..., plan[-1].sent, :] += back()
        grad_k, grad_v = totals.to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None, None


def _start_keys(k: torch.Tensor, v: torch.Tensor, step: Step, axis: Axis) -> Wait:
    """Send what ``step`` says of this rank's keys and values, and receive [2, b, kv_heads, keys, d]."""
    sent = torch.stack([k[:, :, step.sent], v[:, :, step.sent]])
    shape = (*sent.shape[:3], step.received.stop - step.received.start, sent.shape[-1])
    return start_message(sent, step.to, step.origin, shape, axis)


def _start_gradients(found: torch.Tensor, step: Step, axis: Axis) -> Wait:
    """The way back of :func:`_start_keys`, for the gradients of what was received."""
    shape = (*found.shape[:3], step.sent.stop - step.sent.start, found.shape[-1])
    return start_message(found, step.origin, step.to, shape, axis)


def _merge(out: torch.Tensor, log: torch.Tensor, more: torch.Tensor, more_log: torch.Tensor) -> None:
    """Add another tile's output and logarithm to those of the tiles before, in place."""
    total = torch.logaddexp(log, more_log)
    out.mul_((log - total).exp_()[..., None]).addcmul_(more, (more_log - total).exp_()[..., None])
    log.copy_(total)
