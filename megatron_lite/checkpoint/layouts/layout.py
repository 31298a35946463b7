"""How an engine holds its state, described so that saving and loading need not know DeepSpeed.

Every DeepSpeed optimizer wrapper hands the real optimizer tensors of its own making: the parameters
themselves, fp32 copies of them, or flat partitions in which parameters lie end to end, cut where the
partition ends. A :class:`Holder` is such a tensor with the parts of parameters in it. The optimizer's state
for that tensor has the same shape, so the same parts locate the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_lite.checkpoint.regions import Region
from megatron_lite.parallel.parameter import ParameterSpec, spec_of


@dataclass(frozen=True)
class Part:
    """Elements of a parameter at ``offset`` in a flattened holder.

    Attributes:
        name: the parameter's global name.
        shape: its whole shape.
        start: first element, in what this tensor rank has of the parameter, flattened.
        stop: one past the last.
        offset: where they begin in the holder.
        region: what this tensor rank has of the parameter; None: all of it.
        owned: whether this tensor rank saves them, not another one that has them, too.
        is_expert: whether only the expert replicas have them, not all replicas.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    region: Region | None = None
    owned: bool = True
    is_expert: bool = False

    @property
    def key(self) -> tuple[str, Region | None]:
        """What tells this rank's tensors apart: it may have two parts of one parameter."""
        return self.name, self.region

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Packed:
    """A state tensor of ``numel`` elements with a layout of its own (Muon's momentum under ZeRO)."""

    kind: str
    numel: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Holder:
    """A tensor that the optimizer updates.

    Attributes:
        tensor: the tensor; contiguous.
        parts: the parameters' elements in it.
        replicated: whether every rank that could hold the same one does.
        optimizer: the optimizer whose ``state`` belongs to it; None for a parameter that is not trained.
        group: number of its parameter group in that optimizer.
        packed: a state tensor that is not laid out like ``tensor``.
        folder: of the files that the tensors are (offload to NVMe); None: they are in memory.
    """

    tensor: torch.Tensor
    parts: tuple[Part, ...]
    replicated: bool
    optimizer: torch.optim.Optimizer | None = None
    group: int = 0
    packed: Packed | None = None
    folder: Path | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of this tensor; empty before the first step and without an optimizer."""
        if self.optimizer is None or self.tensor not in self.optimizer.state:
            return {}
        return self.optimizer.state[self.tensor]

    def set_number(self, kind: str, value: int | float) -> None:
        """Set a Python number of the optimizer's state."""
        self.state[kind] = value

    @contextmanager
    def in_memory(self) -> Iterator[torch.Tensor]:
        """Within: the optimizer may step. Yields the tensor under which it keeps the state."""
        yield self.tensor


@dataclass(frozen=True)
class Layout:
    """One engine's state.

    Attributes:
        holders: every tensor of this rank that carries parameters' values for the optimizer.
        trained: the model's parameters that the optimizer updates.
        optimizer: the real optimizer under DeepSpeed's wrapper; None without one.
        refresh: makes the model's parameters from the holders, exactly as an optimizer step ends.
        loss_scaler: the object that has the dynamic loss scale's counters; None without one.
    """

    holders: list[Holder]
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    refresh: Callable[[], None]
    loss_scaler: Any = None


def whole_parts(parameter: nn.Parameter, offset: int = 0) -> tuple[Part, ...]:
    """All of ``parameter`` at ``offset``."""
    return parts_of(parameter, 0, parameter.numel(), offset)


def parts_of(parameter: nn.Parameter, start: int, stop: int, offset: int) -> tuple[Part, ...]:
    """Elements ``[start, stop)`` of ``parameter``, as it is here, at ``offset``; of a stack, by expert."""
    parts, first = [], 0
    for spec in spec_of(parameter).members:
        last = first + math.prod(spec.local_shape)
        low, high = max(start, first), min(stop, last)
        if low < high:
            own = (low - first, high - first, offset + low - start)
            parts.append(Part(spec.name, spec.shape, *own, region_of(spec), spec.owned, spec.is_expert))
        first = last
    return tuple(parts)


def region_of(spec: ParameterSpec) -> Region | None:
    """What this tensor rank has of a parameter."""
    return None if spec.shard is None else Region(spec.shard.dim, spec.shard.ranges)


def parts_of_flat(
    parameters: Sequence[nn.Parameter], offsets: Iterable[int], start: int, stop: int
) -> tuple[Part, ...]:
    """The parts in the range ``[start, stop)`` of a buffer in which ``parameters`` begin at ``offsets``."""
    parts: list[Part] = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, start), min(offset + parameter.numel(), stop)
        if first < last:
            parts.extend(parts_of(parameter, first - offset, last - offset, first - start))
    return tuple(parts)


def offsets_of(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Where each of ``parameters`` begins when they lie one after the other."""
    offsets, position = [], 0
    for parameter in parameters:
        offsets.append(position)
        position += parameter.numel()
    return offsets
