"""Writing a checkpoint: every rank its own part, all or nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.files import Item, item_of, write_file
from megatron_lite.checkpoint.folder import (
    TEMPORARY,
    checkpoint_name,
    remove,
    remove_leftovers,
    remove_old,
    replace_checkpoint,
    set_latest,
)
from megatron_lite.checkpoint.fragments import Fragment
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
from megatron_lite.checkpoint.regions import Region
from megatron_lite.checkpoint.signs import Sign, unheard
from megatron_lite.checkpoint.snapshot import Snapshot, take_snapshot
from megatron_lite.checkpoint.together import Group, gather_on_first, on_first_rank, together
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.utils.files import fsync_directory, write_text

RNG_KEY = "rng"
"""Where a rank's random generators are in the metadata of its optimizer file."""


@dataclass(frozen=True)
class Written:
    """What one rank wrote.

    Attributes:
        files: its files.
        pieces: for each piece name, kind, shape, dtype, number among ``files``, start, stop, region.
        scalars: by parameter, the numbers of its optimizer state.
    """

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
    sign: Sign = unheard,
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
            one is complete (see :func:`megatron_lite.checkpoint.folder.remove_old`).
        sign: told that this rank lives, at least every ``files.FLUSHED`` bytes.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank alike, when one could not write (a full disk). The temporary folder is
            removed; the previous checkpoint and ``latest`` are as they were.
    """
    snapshot = together(
        context, lambda: take_snapshot(step, engine, trainer_state, config_keys, context), sign=sign
    )
    return write_checkpoint(folder, snapshot, context, keep_last, sign=sign)


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    context: ParallelContext,
    keep_last: int | None,
    group: Group = None,
    sign: Sign = unheard,
) -> Path:
    """Write every rank's ``snapshot``, then publish; the arguments are those of :func:`save_checkpoint`.

    With ``group`` (all ranks, gloo) the ranks talk over it only: a thread may do this beside the training.
    """
    folder, step = Path(folder), snapshot.head.step
    temporary = folder / f"{TEMPORARY}{checkpoint_name(step)}"
    target = folder / checkpoint_name(step)
    try:
        on_first_rank(context, lambda: make_empty(temporary, sign), group, sign)
        written = together(context, lambda: _write_rank(temporary, snapshot, context, sign), group, sign)
        everything = gather_on_first(context, written, group)
        on_first_rank(
            context,
            lambda: publish(temporary, target, whole_index(snapshot.head, everything), keep_last, sign),
            group,
            sign,
        )
    finally:
        if context.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def make_empty(temporary: Path, sign: Sign = unheard) -> None:
    """Make the temporary folder; runs that were killed while saving may have left some."""
    remove_leftovers(temporary.parent, sign)
    temporary.mkdir(parents=True)


def _write_rank(temporary: Path, snapshot: Snapshot, context: ParallelContext, sign: Sign) -> Written:
    """Write this rank's two files: weights, and optimizer state with the random generators."""
    weights = [fragment for fragment in snapshot.fragments if fragment.kind == WEIGHT]
    states = [fragment for fragment in snapshot.fragments if fragment.kind != WEIGHT]
    files = [
        write_file(weights_file(temporary, context.rank), _items(weights), {}, sign),
        write_file(optimizer_file(temporary, context.rank), _items(states), {RNG_KEY: snapshot.rng}, sign),
    ]
    pieces = [
        (f.name, f.kind, f.shape, str(f.data.dtype).removeprefix("torch."), number, *f.owned, f.region)
        for number, group in enumerate((weights, states))
        for f in group
    ]
    return Written(files, pieces, snapshot.scalars)


def weights_file(checkpoint: Path, rank: int) -> Path:
    """Rank ``rank``'s file of weights."""
    return checkpoint / f"weights_{rank:05d}.safetensors"


def optimizer_file(checkpoint: Path, rank: int) -> Path:
    """Rank ``rank``'s file of optimizer state."""
    return checkpoint / f"optimizer_{rank:05d}.safetensors"


def _items(fragments: list[Fragment]) -> list[Item]:
    return [item_of(tensor_key(f.name, f.kind, *f.owned, f.region), f.owned_data) for f in fragments]


def whole_index(head: Index, everything: list[Written]) -> Index:
    """``head`` with what every rank wrote."""
    index = replace(head, files=[], parameters={})
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
    return index


def publish(
    temporary: Path, target: Path, index: Index, keep_last: int | None = None, sign: Sign = unheard
) -> None:
    """Write the index, give the complete checkpoint its name, let ``latest`` name it, remove old ones."""
    check_complete(index, temporary)
    write_text(temporary / INDEX_NAME, encode_index(index))
    folder = target.parent
    replaced = replace_checkpoint(temporary, target)
    fsync_directory(folder)
    set_latest(folder, index.step)
    if replaced is not None:
        remove(replaced, sign)
    if keep_last is not None:
        remove_old(folder, index.step, max(1, keep_last), sign)
