"""The training loss of each token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token: ``logits [b, s, v]`` (any float dtype), ``labels [b, s]`` → fp32 [b, s].

    The backward writes the gradient over ``logits``, which must not be read afterwards (autograd raises if it
    is needed by another backward). So loss and gradient take no memory of the logits' size, where the
    textbook form takes two to four times it, in fp32.
    """
    return _TokenLoss.apply(logits.flatten(0, 1), labels.flatten()).view(labels.shape)


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


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    """Cuts of the rows of ``logits [n, v]``: 1 MB of fp32 a thread on a CPU (its cache), else 256 MB."""
    count, width = logits.shape
    numbers = 2**18 * torch.get_num_threads() if logits.device.type == "cpu" else 2**26
    step = max(1, numbers // width)
    return (slice(first, first + step) for first in range(0, count, step))
