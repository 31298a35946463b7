"""A checkpoint of step N and nothing but weights, from tensors of another program's files, by a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import torch

import megatron_lite
from megatron_lite.checkpoint.engine_state import COUNTERS
from megatron_lite.checkpoint.files import Item, write_file
from megatron_lite.checkpoint.folder import TEMPORARY, checkpoint_name
from megatron_lite.checkpoint.index import IMPORTED, WEIGHT, Index, tensor_key
from megatron_lite.checkpoint.save import (
    Written,
    make_empty,
    optimizer_file,
    publish,
    weights_file,
    whole_index,
)
from megatron_lite.checkpoint.verification import model_shapes
from megatron_lite.config import Config
from megatron_lite.hf.family import Entry
from megatron_lite.hf.stored import Stored
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import CheckpointError

MODEL_FILE = "model.yml"
"""The keys of the imported model, beside the checkpoint."""

PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}

Read = Callable[[str], torch.Tensor]
"""The tensor of a name in the table, from the files."""


def left_over(
    table: Mapping[str, Entry], config: Config, stored: Mapping[str, Stored], said_by: str
) -> list[str]:
    """The names in ``stored`` that the table has no place for, when all that it needs is there.

    Args:
        table: by our name, its rows; every parameter of the model has one.
        config: the model.
        stored: by name in the table, what is in the files.
        said_by: what the shapes follow from, as a message names it.

    Raises:
        CheckpointError: a tensor is missing, of another shape or of a dtype that is no float.
    """
    shapes = model_shapes(config)
    assert table.keys() == shapes.keys(), table.keys() ^ shapes.keys()
    left = dict.fromkeys(stored)
    for ours, entry in table.items():
        expected = entry.transform.to_theirs(torch.empty(shapes[ours], device="meta"))
        for name, tensor in zip(entry.theirs, expected, strict=True):
            if name not in left:
                raise CheckpointError(f"the weights lack {name} (for {ours}): fetch all files of the model")
            del left[name]
            found = stored[name]
            if found.shape != tensor.shape:
                raise CheckpointError(
                    f"{found.file} has {name} of shape {list(found.shape)}, and by {said_by} it is "
                    f"{list(tensor.shape)}: the two are of different models"
                )
            if found.dtype not in PRECISIONS:
                raise CheckpointError(
                    f"{found.file} has {name} in a dtype other than fp32, bf16 or fp16: save the model in "
                    "one of these; a quantised folder cannot be, so use the one that it was made from"
                )
    return list(left)


def write_checkpoint(
    folder: Path,
    config: Config,
    table: Mapping[str, Entry],
    stored: Mapping[str, Stored],
    read: Read,
    dtype: torch.dtype | None = None,
    step: int = 0,
) -> None:
    """Write ``folder/global_step{step}``: one rank's files, weights only, and ``latest``.

    Tensors stream, in the memory of one of ours. ``dtype``: of the weights; None: as the files have them.

    Raises:
        CheckpointError: a weight does not fit into fp16, or the folder cannot be written.
    """
    shapes = model_shapes(config)
    items: list[Item] = []
    written = Written([], [], {})
    for ours, entry in table.items():
        count = torch.Size(shapes[ours]).numel()
        found = [stored[name].dtype or torch.float32 for name in entry.theirs]
        kind = dtype or reduce(torch.promote_types, found)
        items.append(Item(tensor_key(ours, WEIGHT, 0, count, None), kind, count, _reader(entry, read, kind)))
        name = str(kind).removeprefix("torch.")
        written.pieces.append((ours, WEIGHT, shapes[ours], name, 0, 0, count, None))
    target = folder / checkpoint_name(step)
    temporary = folder / f"{TEMPORARY}{target.name}"
    make_empty(temporary)
    written.files.append(write_file(weights_file(temporary, 0), items, {}))
    written.files.append(write_file(optimizer_file(temporary, 0), [], {}))
    publish(temporary, target, whole_index(_head(config, step), [written]))


def _reader(entry: Entry, read: Read, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """What reads the tensor of ``entry`` when its turn to be written has come."""

    def whole() -> torch.Tensor:
        ours = entry.transform.to_ours([read(name) for name in entry.theirs]).to(dtype)
        if dtype == torch.float16 and not ours.isfinite().all():
            raise CheckpointError(f"{entry.ours} has values that fp16 cannot hold: convert to bf16 or fp32")
        return ours.reshape(-1)

    return whole


def _head(config: Config, step: int) -> Index:
    """The index of a run of which there are only weights."""
    counters = {"step": step, "samples": 0, "tokens": 0}
    engine, versions = dict.fromkeys(COUNTERS, 0), {"megatron_lite": megatron_lite.__version__}
    return Index(step, 1, IMPORTED, counters, config.flat(), engine, {}, versions, [], {})
