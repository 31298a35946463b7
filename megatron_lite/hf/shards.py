"""Weights as safetensors files of a limited size, with Hugging Face's index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_lite.utils.errors import ConfigError, UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes in ``text``: a number and KB, MB, GB (powers of ten), KiB, MiB, GiB (of two), or nothing.

    >>> parse_size("5GB")
    5000000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = match[2].upper() if match else ""
    if match is None or unit not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is not a size: write for example 500MB, 5GB or 4GiB")
    return int(float(match[1]) * UNITS[unit])


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_size: int) -> None:
    """Write ``tensors`` as they come into safetensors files of at most ``max_shard_size`` bytes.

    Holds one file's tensors in memory. One file is called ``model.safetensors``; several are numbered and
    listed in ``model.safetensors.index.json``, as transformers expects. A tensor larger than the limit gets
    a file of its own.

    Raises:
        UserError: a file cannot be written (full disk).
    """
    files: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_size):
        try:
            save_file(shard, _part(folder, len(files)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(
                f"the weights cannot be written to {folder} ({error}): make room there"
            ) from error
        files.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    _name_shards(folder, files, total)


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive ``tensors`` in groups of at most ``max_shard_size`` bytes, or of one."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _name_shards(folder: Path, files: list[list[str]], total: int) -> None:
    """Give the written parts their final names, which tell their number, and write the index."""
    if len(files) == 1:
        _part(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        _part(folder, number).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
