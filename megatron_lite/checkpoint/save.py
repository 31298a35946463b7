"""Writing a checkpoint: every rank its own part, all or nothing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_lite
from megatron_lite.checkpoint.engine_state import counters_of, loss_scaler_of, rng_state
from megatron_lite.checkpoint.files import Item, write_file
from megatron_lite.checkpoint.folder import (
    LATEST,
    checkpoint_name,
    remove_checkpoint,
    remove_old,
    set_latest,
)
from megatron_lite.checkpoint.fragments import Fragment, layout_fragments
from megatron_lite.checkpoint.index import (
    INDEX_NAME,
    WEIGHT,
    FileEntry,
    Index,
    ParameterEntry,
    Piece,
    TensorEntry,
    check_complete,
    encode_index,
    tensor_key,
)
from megatron_lite.checkpoint.layouts import layout_of
from megatron_lite.checkpoint.layouts.layout import Layout
from megatron_lite.checkpoint.optimizer_state import collect_scalars
from megatron_lite.checkpoint.regions import Region
from megatron_lite.checkpoint.together import gather_on_first, on_first_rank, together
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.utils.files import fsync_directory, write_text

TEMPORARY = ".tmp-"
"""How the names of folders begin that are not (or no longer) checkpoints."""

RNG_KEY = "rng"
"""Where a rank's random generators are in the metadata of its optimizer file."""


@dataclass(frozen=True)
class _Written:
    """What one rank wrote: files; for each piece name, kind, shape, dtype, file number, range, region."""

    files: list[FileEntry]
    pieces: list[tuple[str, str, tuple[int, ...], str, int, int, int, Region | None]]
    scalars: dict[str, dict[str, float]]


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Any,
    trainer_state: dict[str, Any],
    config_keys: dict[str, Any],
    context: ParallelContext,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint ``folder/global_step{step}`` and let ``latest`` name it; every rank calls this.

    Each rank writes only what it owns, at the same time as the others, under a temporary name. The checkpoint
    gets its name when every rank's files are on disk. One of the same step is replaced.

    Args:
        folder: where checkpoints are kept; made if need be.
        step: optimizer steps done.
        engine: DeepSpeed's engine, between two steps.
        trainer_state: JSON-able; what the trainer needs to go on (step, samples, data position...).
        config_keys: JSON-able; the run's flat configuration.
        context: this rank.
        keep_last: how many checkpoints stay in ``folder``; all when None. Older ones go only once the new
            one is complete.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank alike, when one could not write (a full disk). The temporary folder is
            removed; the previous checkpoint and ``latest`` are as they were.
    """
    folder = Path(folder)
    temporary = folder / f"{TEMPORARY}{checkpoint_name(step)}"
    target = folder / checkpoint_name(step)
    try:
        on_first_rank(context, lambda: _make_empty(temporary))
        layout = together(context, lambda: layout_of(engine))
        written = together(context, lambda: _write_rank(temporary, layout, context))
        everything = gather_on_first(context, written)

        def finish() -> None:
            index = Index(
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
            _merge(index, everything)
            check_complete(index, temporary)
            write_text(temporary / INDEX_NAME, encode_index(index))
            _publish(temporary, target, step, keep_last)

        on_first_rank(context, finish)
    finally:
        if context.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _make_empty(temporary: Path) -> None:
    """Make the temporary folder; runs that were killed while saving may have left some."""
    for leftover in temporary.parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    for leftover in temporary.parent.glob(f".{LATEST}.*.tmp"):
        leftover.unlink()
    temporary.mkdir(parents=True)


def _write_rank(temporary: Path, layout: Layout, context: ParallelContext) -> _Written:
    """Write this rank's two files: weights, and optimizer state with the random generators."""
    fragments = [f for f in layout_fragments(layout, context) if f.owned[0] < f.owned[1]]
    weights = [fragment for fragment in fragments if fragment.kind == WEIGHT]
    states = [fragment for fragment in fragments if fragment.kind != WEIGHT]
    rng = {RNG_KEY: rng_state(context.device)}
    files = [
        write_file(temporary / f"weights_{context.rank:05d}.safetensors", _items(weights), {}),
        write_file(optimizer_file(temporary, context.rank), _items(states), rng),
    ]
    pieces = [
        (f.name, f.kind, f.shape, str(f.data.dtype).removeprefix("torch."), number, *f.owned, f.region)
        for number, group in enumerate((weights, states))
        for f in group
    ]
    return _Written(files, pieces, collect_scalars(layout))


def optimizer_file(checkpoint: Path, rank: int) -> Path:
    """Rank ``rank``'s file of optimizer state."""
    return checkpoint / f"optimizer_{rank:05d}.safetensors"


def _items(fragments: list[Fragment]) -> list[Item]:
    return [Item(tensor_key(f.name, f.kind, *f.owned, f.region), f.owned_data) for f in fragments]


def _merge(index: Index, everything: list[_Written]) -> None:
    """Put what every rank wrote into ``index``."""
    for written in everything:
        first_file = len(index.files)
        index.files.extend(written.files)
        for name, kind, shape, dtype, number, start, stop, region in written.pieces:
            parameter = index.parameters.setdefault(name, ParameterEntry(()))
            entry = parameter.tensors.setdefault(kind, TensorEntry(shape, dtype, []))
            entry.pieces.append(Piece(first_file + number, start, stop, region))
            if kind == WEIGHT:
                parameter.shape = shape
    for written in everything:
        for name, scalars in written.scalars.items():
            index.parameters[name].scalars.update(scalars)


def _publish(temporary: Path, target: Path, step: int, keep_last: int | None) -> None:
    """Give the complete checkpoint its name, let ``latest`` name it, remove old ones."""
    folder = target.parent
    replaced = folder / f"{TEMPORARY}replaced"
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    fsync_directory(folder)
    set_latest(folder, step)
    if replaced.exists():
        remove_checkpoint(replaced)
    if keep_last is not None:
        remove_old(folder, newest=step, keep_last=max(1, keep_last))


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "deepspeed")}
    return {"megatron_lite": megatron_lite.__version__, "python": platform.python_version(), **packages}
