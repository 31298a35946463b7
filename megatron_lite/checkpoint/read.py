"""A checkpoint read without an engine: for export and generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.files import ElementReader, check_file
from megatron_lite.checkpoint.folder import find_checkpoint
from megatron_lite.checkpoint.index import WEIGHT, Index, read_index
from megatron_lite.checkpoint.signs import Sign, unheard


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
    check_weights(checkpoint, reader.index)
    for name, parameter in reader.index.parameters.items():
        weight = torch.empty(parameter.shape, dtype=torch.float32)
        reader.read_into(weight.view(-1), name, WEIGHT, 0)
        yield name, weight


def check_weights(
    checkpoint: Path, index: Index, rank: int = 0, ranks: int = 1, sign: Sign = unheard
) -> None:
    """Verify the checksums of the files that hold weights: each is one of ``ranks``' to look at.

    ``sign`` is told of every read.

    Raises:
        CheckpointError: one of this rank's is missing or corrupt.
    """
    used = {piece.file for p in index.parameters.values() for piece in p.tensors[WEIGHT].pieces}
    for number in sorted(used)[rank::ranks]:
        check_file(checkpoint, index.files[number], sign)
