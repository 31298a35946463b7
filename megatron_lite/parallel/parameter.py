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

from megatron_lite.config import Config
from megatron_lite.parallel.context import ALONE, Axis, ParallelContext
from megatron_lite.parallel.tensor import ONE_RANK, TensorParallel
from megatron_lite.utils.seeds import derive_seed

CPU = torch.device("cpu")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``precision`` → dtype of the parameters."""

EACH = "*"
"""Stands for the number of the expert in the name of a stack."""

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

    The same parameter of several experts is one tensor, a stack: the experts that are here, end to end. Each
    of them is a parameter of its own by name; ``shape`` and ``shard`` are those of one.

    Attributes:
        name: global name, the same whatever the layout, e.g. ``layers.3.attention.dense.weight``; of a stack
            with :data:`EACH` for the expert's number.
        shape: the whole shape.
        shard: the part of it that is here; None: all of it.
        owned: False where another rank of the tensor axis holds the same elements and answers for them: it
            saves them, and counts them in the norm of the gradient.
        is_expert: whether it is an expert's. The ranks of the expert axis hold different ones, and only the
            ranks of ``ParallelContext.expert_replicas`` the same; all other parameters are on every replica.
        stack: numbers of the experts in a stack; None: it is no stack.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    owned: bool = True
    is_expert: bool = False
    stack: range | None = None

    @property
    def members(self) -> tuple[ParameterSpec, ...]:
        """The parameters that lie end to end in the tensor: those of a stack, otherwise this one."""
        if self.stack is None:
            return (self,)
        return tuple(replace(self, name=self.name.replace(EACH, str(n)), stack=None) for n in self.stack)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that is here: of a stack [experts, shape of each one's part]."""
        shape = list(self.shape)
        if self.shard is not None:
            shape[self.shard.dim] = sum(stop - start for start, stop in self.shard.ranges)
        return tuple(shape) if self.stack is None else (len(self.stack), *shape)

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
        expert: the ranks over which the experts of a layer are divided.
        context: the ranks that share each sequence.
    """

    seed: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    prefix: str = ""
    tensor: TensorParallel = ONE_RANK
    expert: Axis = ALONE
    context: Axis = ALONE

    @classmethod
    def of_rank(
        cls, config: Config, context: ParallelContext, dtype: torch.dtype, device: torch.device = CPU
    ) -> ParameterFactory:
        """The factory of a run's rank."""
        tensor = TensorParallel(context.tensor, config.parallel.sequence_parallel)
        seed = config.training.seed
        return cls(seed, dtype, device, tensor=tensor, expert=context.expert, context=context.context)

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
        parameter = self._declared(ParameterSpec(self.prefix + name, shape, shard, owned), initializer)
        if self.tensor.size > 1 and (partial or (shard is not None and shard.copies > 1)):
            _sum_gradient(parameter, self.tensor.axis, self.tensor.size if shard is None else shard.copies)
        return parameter

    def make_experts(
        self,
        name: str,
        experts: int,
        shape: tuple[int, ...],
        initializer: Initializer,
        shard: Shard | None = None,
    ) -> nn.Parameter:
        """The parameters ``prefix + number + name`` of the experts that are on this rank, stacked.

        Of ``experts`` experts each rank of the expert axis has an equal share, in order. Each is of
        ``shape``, drawn alone, and divided over the tensor ranks by ``shard``: some way or other, so that
        every element has one owner there.
        """
        assert shard is not None or self.tensor.size == 1
        share = experts // self.expert.size
        assert share * self.expert.size == experts, f"{experts} experts over {self.expert.size} ranks"
        stack = range(self.expert.rank * share, (self.expert.rank + 1) * share)
        template = f"{self.prefix}{EACH}.{name}"
        spec = ParameterSpec(template, shape, shard, is_expert=True, stack=stack)
        return self._declared(spec, initializer)

    def _declared(self, spec: ParameterSpec, initializer: Initializer) -> nn.Parameter:
        """The parameter that ``spec`` declares, with its values."""
        if self.device.type == "meta":
            value = torch.empty(spec.local_shape, dtype=self.dtype, device="meta")
        elif spec.stack is None:
            value = self._drawn(spec, initializer)
        else:
            value = torch.stack([self._drawn(member, initializer) for member in spec.members])
        parameter = nn.Parameter(value)
        parameter.spec = spec  # type: ignore[attr-defined]
        # DeepSpeed's norm of the gradient counts the parameters with this mark, and those of tensor rank 0.
        parameter.tensor_model_parallel = spec.owned  # type: ignore[attr-defined]
        return parameter

    def _drawn(self, spec: ParameterSpec, initializer: Initializer) -> torch.Tensor:
        # numpy's memory: within zero.Init torch.empty gives the run's dtype, and the draw depends on it.
        value = torch.from_numpy(np.empty(spec.shape, dtype=np.float32))
        initializer(value, torch.Generator("cpu").manual_seed(derive_seed(self.seed, spec.name)))
        value = value if spec.shard is None else spec.shard.take(value)
        return value.to(device=self.device, dtype=self.dtype)


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
