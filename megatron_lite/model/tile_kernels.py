"""What computes one tile of attention: torch's flash kernels on a CPU or in CUDA, else plain products.

A kernel takes ``q [b, heads, m, d]``, ``k`` and ``v [b, kv_heads, n, d]`` with any strides but a contiguous
last dimension, the tile's shape, and what scores are multiplied by (None: 1 / √d). Beside the output it gives
the logarithm of each query's sum of exponentials, by which the outputs of several tiles become that of one
softmax over all of them. The backward takes the output and the logarithm of the whole softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_lite.model.tiles import Shape, blocks

Tensor = torch.Tensor
Drawn = Tensor | int
"""What a kernel's dropout is drawn from, for the backward to draw the same."""

BLOCK = 256
"""Queries whose scores or mask are in memory at a time."""


@dataclass(frozen=True)
class TileKernel:
    """One implementation.

    Attributes:
        forward: (q, k, v, shape, scale, dropout probability, seed) → output [b, heads, m, d], logarithm [b,
            heads, m], what the dropout was drawn from.
        backward: (gradient of the output, q, k, v, output, logarithm, shape, scale, dropout probability, what
            it was drawn from) → gradients of q, k and v.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Shape, float | None, float, int], tuple[Tensor, Tensor, Drawn]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Shape, float | None, float, Drawn],
        tuple[Tensor, Tensor, Tensor],
    ]


def flash_knows(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether flash attention 2 for CUDA, torch's and the flash-attn package, computes there."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_size <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def tile_kernel(q: Tensor, dropout: float) -> TileKernel:
    """The fastest that can compute with heads like ``q``'s."""
    head_size = q.shape[-1]
    if head_size % 8 == 0 and flash_knows(q.device, q.dtype, head_size):  # the package fills them up to 8
        return CUDA_FLASH
    return CPU_FLASH if q.device.type == "cpu" and not dropout else PLAIN


@lru_cache(maxsize=16)
def _mask(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What to add to the scores: [m, n], 0 where the shape lets a query see, -inf elsewhere."""
    distance = torch.arange(shape.keys, device=device) - torch.arange(shape.queries, device=device)[:, None]
    distance -= shape.keys - shape.queries
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if shape.left is not None:
        hidden |= distance < -shape.left
    if shape.right is not None:
        hidden |= distance > shape.right
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def _cpu_knows(shape: Shape) -> bool:
    """Squares with a diagonal and rectangles without a border; the rest is cut and masked."""
    if shape.left is not None:
        return False
    return shape.right is None or (shape.right == 0 and shape.queries == shape.keys)


def _cpu_blocks(shape: Shape) -> Iterator[tuple[slice, slice, Shape]]:
    """Few queries where the window is small, since a block has as many keys more as the window."""
    reach = max(border for border in (shape.left, shape.right) if border is not None)
    return blocks(shape, max(32, min(BLOCK, reach + 1)))


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float | None, dropout: float, seed: int
) -> tuple[Tensor, Tensor, Drawn]:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if _cpu_knows(shape):
        return *run(q, k, v, 0.0, shape.right == 0, scale=scale), 0
    outs, logs = [], []
    for rows, columns, part in _cpu_blocks(shape):
        mask = _mask(part, q.dtype, q.device)
        out, log = run(q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask, scale=scale)
        outs.append(out)
        logs.append(log)
    return torch.cat(outs, 2), torch.cat(logs, 2), 0


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log: Tensor, shape: Shape,
    scale: float | None, dropout: float, drawn: Drawn,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if _cpu_knows(shape):
        return run(grad, q, k, v, out, log, 0.0, shape.right == 0, scale=scale)
    grad_q = []
    grad_k, grad_v = (torch.zeros_like(each, dtype=log.dtype) for each in (k, v))
    for rows, columns, part in _cpu_blocks(shape):
        own = (each[:, :, rows] for each in (out, log))
        mask = _mask(part, q.dtype, q.device)
        dq, dk, dv = run(
            grad[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns], *own, 0.0, False,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        grad_q.append(dq)
        grad_k[:, :, columns] += dk
        grad_v[:, :, columns] += dv
    return torch.cat(grad_q, 2), grad_k, grad_v


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float | None, dropout: float, seed: int
) -> tuple[Tensor, Tensor, Drawn]:
    out, log, drawn, _, _ = torch.ops.aten._flash_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, shape.queries, shape.keys,
        dropout, shape.right == 0, False, scale=scale, window_size_left=shape.left,
        window_size_right=shape.right,
    )  # fmt: skip
    return out.transpose(1, 2), log, drawn


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log: Tensor, shape: Shape,
    scale: float | None, dropout: float, drawn: Drawn,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2),
        log.contiguous(), None, None, shape.queries, shape.keys, dropout, shape.right == 0, drawn, unused,
        scale=scale, window_size_left=shape.left, window_size_right=shape.right,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float | None, dropout: float, seed: int
) -> tuple[Tensor, Tensor, Drawn]:
    generator = torch.Generator(q.device).manual_seed(seed)
    outs, logs = [], []
    for rows, columns, part in blocks(shape, BLOCK):
        grouped, keys, values = _plain_heads(q[:, :, rows], k[:, :, columns], v[:, :, columns], scale)
        scores = grouped @ keys.mT + _mask(part, grouped.dtype, q.device)
        log = scores.logsumexp(-1, keepdim=True)
        kept = _kept(scores, dropout, generator)
        outs.append((((scores - log).exp() * kept) @ values).flatten(1, 2))
        logs.append(log.squeeze(-1).flatten(1, 2))
    return torch.cat(outs, 2).to(q.dtype), torch.cat(logs, 2), seed


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log: Tensor, shape: Shape,
    scale: float | None, dropout: float, drawn: Drawn,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator(q.device).manual_seed(int(drawn))
    grad_q = []
    grad_k, grad_v = (torch.zeros_like(each, dtype=log.dtype) for each in (k, v))
    groups = (k.shape[1], -1)
    for rows, columns, part in blocks(shape, BLOCK):
        grouped, keys, values = _plain_heads(q[:, :, rows], k[:, :, columns], v[:, :, columns], scale)
        own, came = (each[:, :, rows].to(log.dtype).unflatten(1, groups) for each in (out, grad))
        scores = grouped @ keys.mT + _mask(part, grouped.dtype, q.device)
        weights = (scores - log[:, :, rows].unflatten(1, groups)[..., None]).exp()
        kept = _kept(weights, dropout, generator)
        inner = weights * ((came @ values.mT) * kept - (came * own).sum(-1, keepdim=True))
        grad_q.append((inner @ keys).flatten(1, 2) / _divisor(q, scale))
        grad_k[:, :, columns] += (inner.mT @ grouped).sum(2)
        grad_v[:, :, columns] += ((weights * kept).mT @ came).sum(2)
    return torch.cat(grad_q, 2), grad_k, grad_v


def _divisor(q: Tensor, scale: float | None) -> float:
    """What queries are divided by."""
    return math.sqrt(q.shape[-1]) if scale is None else 1 / scale


def _plain_heads(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries [b, kv_heads, heads / kv_heads, m, d]; keys, values [b, kv_heads, 1, n, d]; ≥ fp32."""
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(exact).unflatten(1, (k.shape[1], -1)) / _divisor(q, scale)
    return grouped, k.to(exact)[:, :, None], v.to(exact)[:, :, None]


def _kept(weights: Tensor, dropout: float, generator: torch.Generator) -> Tensor | float:
    """What each weight is multiplied with."""
    if not dropout:
        return 1.0
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (drawn >= dropout).to(weights.dtype) / (1.0 - dropout)


CPU_FLASH = TileKernel(_cpu_forward, _cpu_backward)
CUDA_FLASH = TileKernel(_cuda_forward, _cuda_backward)
PLAIN = TileKernel(_plain_forward, _plain_backward)
