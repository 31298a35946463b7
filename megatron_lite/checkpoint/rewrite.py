"""A checkpoint written anew, cut for other ranks: the same elements in other files, without an engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.files import ElementReader, Item, check_file, write_file
from megatron_lite.checkpoint.folder import TEMPORARY, checkpoint_name
from megatron_lite.checkpoint.index import WEIGHT, ParameterEntry, tensor_key
from megatron_lite.checkpoint.regions import Region
from megatron_lite.checkpoint.save import (
    RNG_KEY,
    Written,
    make_empty,
    optimizer_file,
    publish,
    weights_file,
    whole_index,
)
from megatron_lite.utils.errors import CheckpointError


@dataclass(frozen=True)
class Span:
    """Elements ``[start, stop)`` of the flattened ``region`` (None: all) of the parameter ``name``."""

    name: str
    region: Region | None
    start: int
    stop: int


def rewrite_checkpoint(
    source: Path, out: Path, shares: Sequence[Sequence[Span]], config_keys: dict[str, Any]
) -> Path:
    """Write the checkpoint ``source`` as ``out/global_step…``, each rank's files holding its share.

    Every file of ``source`` is verified first. Then elements stream from the old files to the new ones: the
    memory is that of one tensor. Optimizer state is cut as its parameter is. Each rank's random generators go
    along where the number of ranks stays the same.

    Args:
        source: a checkpoint.
        out: the new folder of checkpoints; must not exist, or be empty.
        shares: by rank, what it stores of the parameters; all together cover each parameter exactly once.
        config_keys: JSON-able; the flat configuration of the new layout.

    Raises:
        CheckpointError: ``source`` is not sound, or ``out`` cannot be written. ``out`` is as it was.
    """
    made = not out.exists()
    if not made and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and not empty: name a new folder")
    reader = ElementReader.of(source)
    for entry in reader.index.files:
        check_file(source, entry)
    target = out / checkpoint_name(reader.index.step)
    temporary = out / f"{TEMPORARY}{target.name}"
    try:
        make_empty(temporary)
        written = [
            _write_rank(temporary, rank, spans, reader, len(shares)) for rank, spans in enumerate(shares)
        ]
        scalars = {name: entry.scalars for name, entry in reader.index.parameters.items()}
        head = replace(reader.index, world_size=len(shares), config=config_keys)
        publish(temporary, target, whole_index(head, [*written, Written([], [], scalars)]))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and not any(out.glob("*")):
            out.rmdir()
    return target


def _write_rank(
    temporary: Path, rank: int, spans: Sequence[Span], reader: ElementReader, ranks: int
) -> Written:
    """Write the two files of ``rank``."""
    index = reader.index
    weights = [(span, WEIGHT) for span in spans]
    states = [pair for span in spans for pair in _states(span, index.parameters[span.name])]
    metadata = _random_generators(reader, rank) if index.world_size == ranks else {}
    files = [
        write_file(weights_file(temporary, rank), [_item(reader, *pair) for pair in weights], {}),
        write_file(optimizer_file(temporary, rank), [_item(reader, *pair) for pair in states], metadata),
    ]
    pieces = []
    for number, group in enumerate((weights, states)):
        for span, kind in group:
            entry = index.tensor(span.name, kind)
            pieces.append(
                (span.name, kind, entry.shape, entry.dtype, number, span.start, span.stop, span.region)
            )
    return Written(files, pieces, {})


def _states(span: Span, parameter: ParameterEntry) -> Iterator[tuple[Span, str]]:
    """The optimizer state that goes with ``span``: the same elements, or all of a state with another shape.

    Such a one (Adafactor's factors) goes with the parameter's first element.
    """
    has_first = span.start == 0 and (span.region is None or span.region.ranges[0][0] == 0)
    for kind in sorted(parameter.tensors.keys() - {WEIGHT}):
        shape = parameter.tensors[kind].shape
        if shape == parameter.shape:
            yield span, kind
        elif has_first:
            yield Span(span.name, None, 0, torch.Size(shape).numel()), kind


def _item(reader: ElementReader, span: Span, kind: str) -> Item:
    dtype = getattr(torch, reader.index.tensor(span.name, kind).dtype)

    def read() -> torch.Tensor:
        elements = torch.empty(span.stop - span.start, dtype=dtype)
        reader.read_into(elements, span.name, kind, span.start, span.region)
        return elements

    return Item(
        tensor_key(span.name, kind, span.start, span.stop, span.region), dtype, span.stop - span.start, read
    )


def _random_generators(reader: ElementReader, rank: int) -> dict[str, str]:
    name = optimizer_file(reader.checkpoint, rank).name
    number = next(n for n, entry in enumerate(reader.index.files) if entry.name == name)
    return {key: text for key, text in reader.metadata(number).items() if key == RNG_KEY}
