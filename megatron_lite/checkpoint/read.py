"""A checkpoint read without an engine: for export and generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.files import ElementReader, check_file
from megatron_lite.checkpoint.folder import find_checkpoint
from megatron_lite.checkpoint.index import WEIGHT, read_index


def read_config(path: Path) -> dict[str, Any]:
    """The flat keys of the run that wrote the checkpoint ``path`` (or the latest one in that folder)."""
    return read_index(find_checkpoint(path)).config


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter's global name and whole weight (fp32, CPU), one at a time, whatever layout wrote them.

    ``path`` is a checkpoint or a folder with ``latest``. The files that hold weights are checked first (one
    read of them); then memory is bounded by one tensor. The optimizer's files may be absent.

    Raises:
        CheckpointError: missing, incomplete or corrupt.
    """
    checkpoint = find_checkpoint(path)
    reader = ElementReader.of(checkpoint)
    index = reader.index
    used = {piece.file for p in index.parameters.values() for piece in p.tensors[WEIGHT].pieces}
    for number in sorted(used):
        check_file(checkpoint, index.files[number])
    for name, parameter in index.parameters.items():
        weight = torch.empty(parameter.shape, dtype=torch.float32)
        reader.read_into(weight.view(-1), name, WEIGHT, 0)
        yield name, weight
