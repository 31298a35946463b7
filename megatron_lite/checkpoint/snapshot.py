"""What one rank puts into a checkpoint: its state as it is between two steps."""

from __future__ import annotations

import platform
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

import megatron_lite
from megatron_lite.checkpoint.engine_state import counters_of, loss_scaler_of, rng_state
from megatron_lite.checkpoint.fragments import Fragment, layout_fragments
from megatron_lite.checkpoint.index import Index
from megatron_lite.checkpoint.layouts import layout_of
from megatron_lite.checkpoint.layouts.swapped import copies_on_disk
from megatron_lite.checkpoint.optimizer_state import collect_scalars
from megatron_lite.parallel.context import ParallelContext


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint.

    Attributes:
        head: the index without files and parameters; rank 0's is the one that is written.
        fragments: the elements that this rank saves.
        rng: this rank's random generators.
        scalars: by parameter, the numbers of its optimizer state.
    """

    head: Index
    fragments: list[Fragment]
    rng: str
    scalars: dict[str, dict[str, float]]


def take_snapshot(
    step: int,
    engine: Any,
    trainer_state: dict[str, Any],
    config_keys: dict[str, Any],
    context: ParallelContext,
) -> Snapshot:
    """The state of ``engine``, whose tensors it shares: it is the state of now only until the next step.

    The arguments are those of :func:`megatron_lite.checkpoint.save.save_checkpoint`. Raises
    :class:`CheckpointError` when DeepSpeed keeps the state in a way that is not supported.
    """
    layout = layout_of(engine)
    head = Index(
        step=step,
        world_size=context.world_size,
        optimizer=type(layout.optimizer).__name__,
        trainer_state=trainer_state,
        config=config_keys,
        engine=counters_of(engine),
        loss_scaler=loss_scaler_of(layout),
        versions=_versions(),
        files=[],
        parameters={},
    )
    fragments = [f for f in layout_fragments(layout, context) if f.owned[0] < f.owned[1]]
    return Snapshot(head, fragments, rng_state(context.device), collect_scalars(layout))


def copied(snapshot: Snapshot, device: torch.device) -> Snapshot:
    """``snapshot`` with copies of all that training may change.

    What is in files (offload to NVMe) is copied to a file beside them, all else to CPU memory: pinned where
    it comes from an accelerator, so that all is on its way at the same time; it has arrived when this
    returns. Costs this rank's share of the checkpoint, there, until the copies are let go. Raises OSError
    when the disk is full.
    """
    copies: dict[int, torch.Tensor] = {}
    for folder in {fragment.folder for fragment in snapshot.fragments}:
        own = [number for number, fragment in enumerate(snapshot.fragments) if fragment.folder == folder]
        data = [snapshot.fragments[number].owned_data for number in own]
        copies |= zip(own, map(_copy, data) if folder is None else copies_on_disk(data, folder), strict=True)
    fragments = [
        replace(fragment, start=fragment.owned[0], stop=fragment.owned[1], data=copies[number])
        for number, fragment in enumerate(snapshot.fragments)
    ]
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return replace(snapshot, head=deepcopy(snapshot.head), fragments=fragments)


def _copy(data: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=data.device.type != "cpu")
    return copy.copy_(data, non_blocking=True)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "deepspeed")}
    return {"megatron_lite": megatron_lite.__version__, "python": platform.python_version(), **packages}
