"""The training loss of each token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lite.parallel.context import ALONE, Axis


def token_loss(logits: torch.Tensor, labels: torch.Tensor, tensor: Axis = ALONE) -> torch.Tensor:
    """Cross entropy of each token: ``logits [b, s, v]`` (any float dtype), ``labels [b, s]`` → fp32 [b, s].

    Where the ``tensor`` axis has several ranks, each has its range of the vocabulary in ``logits [b, s, v /
    ranks]`` and all labels; every rank gets the losses. They exchange three numbers a token, never logits.

    The backward writes the gradient over ``logits``, which must not be read afterwards (autograd raises if it
    is needed by another backward). So loss and gradient take no memory of the logits' size, where the
    textbook form takes two to four times it, in fp32.
    """
    rows, targets = logits.flatten(0, 1), labels.flatten()
    if tensor.size == 1:
        return _TokenLoss.apply(rows, targets).view(labels.shape)
    return _SharedTokenLoss.apply(rows, targets - tensor.rank * rows.shape[1], tensor).view(labels.shape)


class _TokenLoss(torch.autograd.Function):
    """Works through slices of rows in fp32, each small enough for the cache."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, labels)
        loss = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        for rows in _slices(logits):
            loss[rows] = F.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
        return loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        for rows in _slices(logits):
            part = torch.softmax(logits[rows], dim=-1, dtype=torch.float32)
            part[torch.arange(len(part), device=part.device), labels[rows]] -= 1.0
            logits[rows] = part.mul_(gradient[rows, None])
        return logits, None


class _SharedTokenLoss(torch.autograd.Function):
    """The same where each rank has some columns; labels that are no column of this rank's are another's."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: torch.Tensor, labels: torch.Tensor, axis: Axis
    ) -> torch.Tensor:
        top = logits.amax(-1).float()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
        # Sums of exp(logit - top), and the labels' logits - top, which one rank contributes.
        sums = logits.new_zeros(2, len(labels), dtype=torch.float32)
        for rows in _slices(logits):
            part = logits[rows] - top[rows, None]  # in fp32
            own, column = _own_columns(labels[rows], logits.shape[1])
            sums[1, rows] = part.gather(1, column[:, None]).squeeze(1).mul_(own)
            sums[0, rows] = part.exp_().sum(-1)
        dist.all_reduce(sums, group=axis.group)
        log_sum = sums[0].log_()
        ctx.save_for_backward(logits, labels, log_sum + top)
        return log_sum - sums[1]

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        logits, labels, log_sum = ctx.saved_tensors  # type: ignore[attr-defined]
        for rows in _slices(logits):
            part = (logits[rows] - log_sum[rows, None]).exp_()
            own, column = _own_columns(labels[rows], logits.shape[1])
            part[torch.arange(len(part), device=part.device), column] -= own
            logits[rows] = part.mul_(gradient[rows, None])
        return logits, None, None


def _own_columns(labels: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(1.0 where the label is one of ``width`` columns, else 0.0; the column, 0 for the others)."""
    own = (labels >= 0) & (labels < width)
    return own.float(), labels.where(own, 0)


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    """Cuts of the rows of ``logits [n, v]``: 1 MB of fp32 a thread on a CPU (its cache), else 256 MB."""
    count, width = logits.shape
    numbers = 2**18 * torch.get_num_threads() if logits.device.type == "cpu" else 2**26
    step = max(1, numbers // width)
    return (slice(first, first + step) for first in range(0, count, step))
