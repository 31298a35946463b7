"""The weights of a Hugging Face folder: safetensors or PyTorch's own files, one or many, memory-mapped."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.files import DTYPES
from megatron_lite.utils.errors import CheckpointError

NAMES = ("model.safetensors", "pytorch_model.bin")
"""Of the weights, the better kind first. Several files have an index of this name and ``.index.json``."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


EXPERT = "{j}"
"""Stands for the number of an expert in a name."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: where.
        shape: its own.
        dtype: likewise; None: none that checkpoints here have.
        within: of a part of a fused tensor: name of the whole, the expert, the first row.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    within: tuple[str, int, int] | None = None


class StoredTensors:
    """The tensors of ``folder``.

    One file is open at a time, mapped into memory: what was read of it can be dropped by the system.

    Args:
        folder: has the files.
        parts_of: :meth:`megatron_lite.hf.family.Family.parts_of`.

    Attributes:
        found: by name in the files, what is there; of a fused tensor, its parts.

    Raises:
        CheckpointError: there are no weights, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, parts_of: Callable[[str], tuple[str, ...]]) -> None:
        self._open: tuple[Path, Callable[[str], torch.Tensor]] | None = None
        files, listed = _weight_files(folder)
        whole: dict[str, Stored] = {}
        for file in files:
            for name, (shape, dtype) in _contents(file).items():
                if name in whole:
                    raise CheckpointError(f"{name} is in {whole[name].file} and in {file}: remove one")
                whole[name] = Stored(file, tuple(shape), dtype)
        for name, file in listed.items():
            if name not in whole or whole[name].file != file:
                raise CheckpointError(f"{file} lacks the tensor {name}, which the index says it has")
        self.found: dict[str, Stored] = {}
        for name, stored in whole.items():
            parts = parts_of(name)
            self.found |= _taken_apart(name, stored, parts) if parts else {name: stored}

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` (CPU); its memory is the file's."""
        stored = self.found[name]
        if self._open is None or self._open[0] != stored.file:
            self._open = None  # before the next
            self._open = (stored.file, _reader(stored.file))
        if stored.within is None:
            return self._open[1](name)
        whole, expert, row = stored.within
        return self._open[1](whole)[expert, row : row + stored.shape[0]]


def _taken_apart(name: str, fused: Stored, parts: tuple[str, ...]) -> dict[str, Stored]:
    """The ``parts`` of all experts in the tensor ``name``."""
    if len(fused.shape) != 3 or fused.shape[1] % len(parts):
        raise CheckpointError(
            f"{fused.file} has {name} of shape {list(fused.shape)}, and all experts' {len(parts)} parts "
            "would be [experts, rows, columns]: fetch it anew"
        )
    experts, rows = fused.shape[0], fused.shape[1] // len(parts)
    return {
        part.replace(EXPERT, str(expert)): replace(
            fused, shape=(rows, fused.shape[2]), within=(name, expert, number * rows)
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    }


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files with weights, and what their index says: name → file; empty without an index."""
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name], {}
        if index.is_file():
            try:
                listed = {
                    key: folder / value for key, value in json.loads(index.read_bytes())["weight_map"].items()
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} is not an index of weights ({error!r}): fetch it anew"
                ) from None
            files = sorted(set(listed.values()))
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder} lacks {', '.join(missing)}, which {index.name} names: fetch all files"
                )
            return files, listed
    raise CheckpointError(
        f"{folder} has no weights: none of {', '.join(NAMES)} or their index (*.index.json) is there"
    )


def _contents(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor in ``file``."""
    if file.suffix != ".safetensors":
        return {name: (tuple(t.shape), t.dtype) for name, t in _unpickled(file).items()}
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        return {
            name: (tuple(each.get_shape()), TORCH_DTYPES.get(each.get_dtype()))
            for name, each in slices.items()
        }


def _reader(file: Path) -> Callable[[str], torch.Tensor]:
    if file.suffix != ".safetensors":
        return _unpickled(file).__getitem__
    return _opened(file).get_tensor


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it anew") from None


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save; nothing in it is executed."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} is damaged, or holds more than tensors ({reason}): fetch it anew, or use safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(
            f"{file} is not a dictionary of tensors: use the files that transformers writes"
        )
    return content
