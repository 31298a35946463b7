"""An engine's state on one rank as a flat list of fragments: what is saved, and what is filled on loading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.index import WEIGHT
from megatron_lite.checkpoint.layouts import layout_of
from megatron_lite.checkpoint.layouts.layout import Holder, Layout, Part, region_of
from megatron_lite.checkpoint.regions import Region
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.utils.errors import CheckpointError

Owned = dict[tuple[str, Region | None], tuple[int, int]]
"""By :attr:`Part.key`, the range of elements that this rank saves; none of a part that is not there."""


@dataclass(frozen=True)
class Fragment:
    """Elements of one tensor of one parameter that this rank holds.

    Attributes:
        name: the parameter's global name.
        kind: ``weight`` or the name of an optimizer state (``exp_avg``).
        shape: the whole shape of the tensor (the parameter's, except for factored states).
        region: the part of the tensor that this tensor rank has; None: all of it.
        start: first element, in that part, flattened.
        stop: one past the last element.
        data: the elements, 1-D; writing to it changes the engine.
        owned: the range, within ``[start, stop)``, that this rank saves; the other ranks save the rest.
        folder: of the file that ``data`` is (offload to NVMe); None: it is in memory.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    region: Region | None
    start: int
    stop: int
    data: torch.Tensor
    owned: tuple[int, int]
    folder: Path | None = None

    @property
    def owned_data(self) -> torch.Tensor:
        """The elements that this rank saves."""
        return self.data[self.owned[0] - self.start : self.owned[1] - self.start]


def iter_fragments(engine: Any, context: ParallelContext) -> Iterator[Fragment]:
    """The fragments of ``engine`` (DeepSpeed's) on this rank: weights and optimizer state.

    Over all ranks the ``owned`` ranges cover each tensor exactly once.
    """
    return layout_fragments(layout_of(engine), context)


def layout_fragments(layout: Layout, context: ParallelContext) -> Iterator[Fragment]:
    """The fragments of an engine whose layout is known already."""
    owned = _owned_ranges(layout.holders, context)
    owned |= dict.fromkeys(_tied_copies(layout), (0, 0))
    for holder in layout.holders:
        for part in holder.parts:
            yield _fragment(WEIGHT, part, holder.tensor, holder, owned)
        for kind, value in sorted(holder.state.items()):
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                yield from _state_fragments(kind, value, holder, owned)


def _state_fragments(kind: str, value: torch.Tensor, holder: Holder, owned: Owned) -> Iterator[Fragment]:
    if holder.packed is not None and holder.packed.kind == kind and holder.packed.numel == value.numel():
        for part in holder.packed.parts:
            yield _fragment(kind, part, value, holder, owned)
    elif value.shape == holder.tensor.shape:
        for part in holder.parts:
            yield _fragment(kind, part, value, holder, owned)
    else:
        yield _whole_fragment(kind, value, holder, owned)


def _fragment(kind: str, part: Part, tensor: torch.Tensor, holder: Holder, owned: Owned) -> Fragment:
    data = tensor.detach().view(-1)[part.offset : part.offset + part.numel]
    first, last = owned.get(part.key, (0, 0))
    clipped = (max(first, part.start), min(last, part.stop))
    mine = clipped if clipped[0] < clipped[1] else (part.start, part.start)
    place = (part.shape, part.region, part.start, part.stop)
    return Fragment(part.name, kind, *place, data, mine, holder.folder)


def _whole_fragment(kind: str, value: torch.Tensor, holder: Holder, owned: Owned) -> Fragment:
    """A state of a shape of its own (Adafactor's factors): kept whole, by whoever saves the first element."""
    if len(holder.parts) != 1 or holder.parts[0].shape != tuple(holder.tensor.shape):
        raise CheckpointError(
            f"the optimizer's state {kind} has shape {tuple(value.shape)} for several parameters laid end to "
            "end, which a checkpoint cannot divide; use ZeRO stage 0"
        )
    part = holder.parts[0]
    first, last = owned.get(part.key, (0, 0))
    mine = (0, value.numel()) if first == 0 < last else (0, 0)
    return Fragment(
        part.name, kind, tuple(value.shape), None, 0, value.numel(), value.detach().view(-1), mine
    )


def _tied_copies(layout: Layout) -> list[tuple[str, Region | None]]:
    """Parameters that an earlier pipeline stage holds, too, and saves (by DeepSpeed's mark)."""
    copies = [spec_of(p) for p in layout.trained if getattr(p, "ds_pipe_replicated", False)]
    return [(spec.name, region_of(spec)) for spec in copies]


def _owned_ranges(holders: list[Holder], context: ParallelContext) -> Owned:
    """By parameter, the element range that this rank saves.

    A partition is its rank's own. What every replica holds (of experts: every expert replica) is laid end to
    end and cut into equal shares, so that the ranks write at the same time and each byte is written once.
    """
    parts = [(part, holder.replicated) for holder in holders for part in holder.parts if part.owned]
    owned = {part.key: (part.start, part.stop) for part, replicated in parts if not replicated}
    for axis, experts in ((context.replicas, False), (context.expert_replicas, True)):
        owned |= _share(
            [part for part, replicated in parts if replicated and part.is_expert == experts], axis
        )
    return owned


def _share(parts: list[Part], axis: Axis) -> Owned:
    """The range of each of ``parts`` in this rank's equal share of them all."""
    total = sum(part.numel for part in parts)
    start = total * axis.rank // axis.size
    stop = total * (axis.rank + 1) // axis.size
    owned, position = {}, 0
    for part in parts:
        first, last = max(start, position), min(stop, position + part.numel)
        owned[part.key] = (first - position, last - position) if first < last else (0, 0)
        position += part.numel
    return owned
