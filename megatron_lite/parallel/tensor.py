"""Tensor parallelism as a layer sees it: which part is mine, how do activations enter and leave.

The ranks of the tensor axis share every layer of one model (Shoeybi et al., arXiv 1909.08053). Between the
layers each has the whole residual stream, or with ``splits_sequence`` a slice of its sequence (Korthikanti et
al., arXiv 2205.05198): same traffic, and norms, dropout and residuals are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_lite.parallel.collectives import (
    gathered,
    scattered_sum,
    shared,
    start_gather,
    start_scattered_sum,
    start_sum,
    sum_over,
)
from megatron_lite.parallel.context import ALONE, Axis
from megatron_lite.utils.seeds import derive_seed


@dataclass(frozen=True)
class TensorParallel:
    """The tensor axis, and how the residual stream is kept along it.

    Attributes:
        axis: the ranks that share each layer.
        sequence_parallel: the key of that name; of no effect with one rank.
    """

    axis: Axis = ALONE
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.axis.size

    @property
    def splits_sequence(self) -> bool:
        """Whether the residual stream is [b, s / size, hidden] instead of [b, s, hidden]."""
        return self.sequence_parallel and self.size > 1

    def slice_of(self, length: int) -> slice:
        """The positions of a sequence of ``length`` that this rank's residual stream has."""
        if not self.splits_sequence:
            return slice(0, length)
        part = length // self.size
        return slice(self.axis.rank * part, (self.axis.rank + 1) * part)

    def whole_length(self, x: torch.Tensor) -> int:
        """The length of the sequence of which ``x [b, s or s / size, hidden]`` is the residual stream."""
        return x.shape[1] * (self.size if self.splits_sequence else 1)

    def column_linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """From the residual stream into this rank's columns: ``[b, s, inputs] → [b, s, outputs / size]``.

        ``weight [outputs / size, inputs]`` and ``bias`` are this rank's rows.
        """
        if self.size == 1:
            return F.linear(x, weight, bias)
        return _ColumnLinear.apply(x, weight, bias, self)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream whole, [b, s, hidden], for a part of the model that divides itself its own way.

        Each rank finds a share of the gradient there.
        """
        return (gathered if self.splits_sequence else shared)(x, self.axis)

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """From each rank's share of a sum [b, s, hidden] back to the residual stream."""
        return (scattered_sum if self.splits_sequence else sum_over)(partial, self.axis)

    @contextmanager
    def own_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Within: random numbers (attention's dropout) that each tensor rank draws for itself.

        Outside, where ranks hold the same activations, their generators stay in step. With
        ``splits_sequence`` they differ everywhere already. The seed is drawn from the CPU's generator, which
        recomputing a layer sets back like the device's.
        """
        if self.size == 1 or self.splits_sequence:
            yield
            return
        seed = int(torch.randint(2**62, ()))
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            torch.manual_seed(derive_seed(seed, "tensor", self.axis.rank))
            yield


ONE_RANK = TensorParallel()
"""Layers that nobody shares."""


class _ColumnLinear(torch.autograd.Function):
    """A linear layer on what ranks share, whose backward computes while it communicates.

    With ``splits_sequence`` the input's slice is kept for the backward and gathered there again: one more
    exchange instead of the memory of whole sequences.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tensor: TensorParallel,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tensor, ctx.has_bias = tensor, bias is not None  # type: ignore[attr-defined]
        whole = start_gather(x, tensor.axis)() if tensor.splits_sequence else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        tensor: TensorParallel = ctx.tensor  # type: ignore[attr-defined]
        split, axis = tensor.splits_sequence, tensor.axis
        gathered = start_gather(x, axis) if split else lambda: x
        partial = gradient @ weight
        summed = start_scattered_sum(partial, axis) if split else start_sum(partial, axis)
        grad_weight = grad_bias = None
        whole = gathered()
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_weight = gradient.flatten(0, -2).T @ whole.flatten(0, -2)
        if ctx.has_bias:  # type: ignore[attr-defined]
            grad_bias = gradient.flatten(0, -2).sum(0)
        return summed(), grad_weight, grad_bias, None
