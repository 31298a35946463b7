"""How a parameter is declared: its name, its whole shape, its initialisation, which part of it is here.

Said once, read by all: initialisation, checkpoints, gradient norms, weight decay and Hugging Face conversion
know a parameter by the :class:`ParameterSpec` that it carries as ``parameter.spec``; nothing else looks at
module paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.tensor import ONE_RANK, TensorParallel
from megatron_lite.utils.seeds import derive_seed

CPU = torch.device("cpu")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``precision`` → dtype of the parameters."""

Initializer = Callable[[torch.Tensor, torch.Generator], None]
"""Fills an fp32 CPU tensor in place, drawing from the generator."""


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one tensor-parallel rank holds.

    Attributes:
        dim: the dimension that is divided.
        ranges: ranges ``(start, stop)`` of indices of that dimension, laid end to end in the rank's tensor.
        copies: how many neighbouring tensor ranks hold this same part; they add up its gradients.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]
    copies: int = 1

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of ``whole``."""
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim)


def even_shard(dim: int, size: int, axis: Axis, parts: int = 1) -> Shard | None:
    """An equal share of a dimension of ``size`` for each rank of ``axis``; None when there is one rank.

    The dimension is made of ``parts`` equal parts ([gate; up]), each of which is divided.
    """
    if axis.size == 1:
        return None
    whole, share = size // parts, size // parts // axis.size
    assert share * axis.size * parts == size, f"{size} in {parts} parts over {axis.size} ranks"
    firsts = [part * whole + axis.rank * share for part in range(parts)]
    return Shard(dim, tuple((first, first + share) for first in firsts))


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is, and which part of it this rank holds.

    Attributes:
        name: global name, the same whatever the layout, e.g. ``layers.3.attention.dense.weight``.
        shape: the whole shape.
        shard: the part of it that is here; None: all of it.
        owned: False where another rank of the tensor axis holds the same elements and answers for them: it
            saves them, and counts them in the norm of the gradient.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    owned: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part that is here."""
        if self.shard is None:
            return self.shape
        length = sum(stop - start for start, stop in self.shard.ranges)
        return (*self.shape[: self.shard.dim], length, *self.shape[self.shard.dim + 1 :])

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices only, not to biases and norm weights."""
        return len(self.shape) >= 2


@dataclass(frozen=True)
class ParameterFactory:
    """Makes the parameters of one module, and hands a child factory to each submodule.

    Each parameter is drawn whole, on the CPU, in fp32, from a generator keyed by the seed and its global
    name: the model is the same on every device, in every dtype and under every layout. Drawing inside the
    module's constructor (not in a loop afterwards) is what DeepSpeed's ``zero.Init`` asks for: it partitions
    a submodule as soon as the submodule's ``__init__`` returns.

    Attributes:
        seed: the run's seed.
        dtype: dtype of the parameters.
        device: where they live; ``meta`` makes them without storage and without drawing.
        prefix: global name of the module that is being built, with a trailing dot; empty at the root.
        tensor: the ranks that share every layer, for the layers to divide themselves by.
    """

    seed: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    prefix: str = ""
    tensor: TensorParallel = ONE_RANK

    def child(self, name: str) -> ParameterFactory:
        """The factory for the submodule ``name``."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def make(
        self,
        name: str,
        shape: tuple[int, ...],
        initializer: Initializer,
        shard: Shard | None = None,
        partial: bool = False,
    ) -> nn.Parameter:
        """The parameter ``prefix + name`` of ``shape``, filled by ``initializer``, carrying its ``spec``.

        ``shard`` is the part that this tensor rank keeps. ``partial`` says of a parameter that every tensor
        rank keeps that each finds a share of its gradient only (it has seen its own heads, or its own slice
        of the sequence): the shares are added up in the backward, in fp32.
        """
        rank = self.tensor.axis.rank
        owned = rank == 0 if shard is None else rank % shard.copies == 0
        spec = ParameterSpec(self.prefix + name, shape, shard, owned)
        if self.device.type == "meta":
            value = torch.empty(spec.local_shape, dtype=self.dtype, device="meta")
        else:
            # numpy's memory: within zero.Init torch.empty gives the run's dtype, and the draw depends on it.
            value = torch.from_numpy(np.empty(shape, dtype=np.float32))
            initializer(value, torch.Generator("cpu").manual_seed(derive_seed(self.seed, spec.name)))
            value = (value if shard is None else shard.take(value)).to(device=self.device, dtype=self.dtype)
        parameter = nn.Parameter(value)
        parameter.spec = spec  # type: ignore[attr-defined]
        # DeepSpeed's norm of the gradient counts the parameters with this mark, and those of tensor rank 0.
        parameter.tensor_model_parallel = owned  # type: ignore[attr-defined]
        if self.tensor.size > 1 and (partial or (shard is not None and shard.copies > 1)):
            _sum_gradient(parameter, self.tensor.axis, self.tensor.size if shard is None else shard.copies)
        return parameter


def _sum_gradient(parameter: nn.Parameter, axis: Axis, copies: int) -> None:
    """Add up, over each ``copies`` neighbours of ``axis``, every gradient that a backward finds.

    Before the gradient is accumulated, so that ZeRO of any stage takes it for the gradient. Neighbours fewer
    than the axis use its group all the same, each set of them its own place: for key/value heads, which are
    few, that costs less than process groups of their own.
    """
    places, own = axis.size // copies, axis.rank // copies

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        shares = torch.zeros(places, *gradient.shape, dtype=torch.float32, device=gradient.device)
        shares[own] = gradient
        dist.all_reduce(shares, group=axis.group)
        return shares[own].to(gradient.dtype)

    parameter.register_hook(summed)


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The declaration that ``parameter`` carries."""
    return parameter.spec  # type: ignore[attr-defined]
