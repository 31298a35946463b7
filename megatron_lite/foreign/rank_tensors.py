"""The weights in a folder that GPT-NeoX (DeepSpeed) wrote: which file of which tensor rank has which tensor.

With a pipeline (``pipe_parallel_size`` of 1 or more) there is one file for each layer of the model and tensor
rank, ``layer_02-model_00-model_states.pt``; otherwise one for each tensor rank,
``mp_rank_00_model_states.pt``, with all layers: ``sequential.2.attention.dense.weight``. Layers count as in
GPT-NeoX's list: 0 is the embedding, 2 the first transformer layer; behind the last one come a function
without weights, the final norm, the head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from megatron_lite.foreign.pickled import load_pickled
from megatron_lite.hf.stored import Stored
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import CheckpointError

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
SEQUENTIAL = re.compile(r"sequential\.(\d+)\.(.+)")
STEP_FOLDER = re.compile(r"global_step(\d+)")
Place = Callable[[str], tuple[int, str] | None]
READABLE = frozenset(DTYPES.values())


def find_step(folder: Path, iteration: int | None = None) -> tuple[Path, int]:
    """The checkpoint that ``folder`` means, and its step (0 where its name does not say).

    Args:
        folder: a checkpoint itself, or the folder of checkpoints, where ``latest`` names one.
        iteration: which one; the latest when None.

    Raises:
        CheckpointError: it is not there.
    """
    latest = folder / "latest"
    if iteration is not None:
        found = folder / f"global_step{iteration}"
    elif latest.is_file():
        found = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
    else:
        found = folder
    if not found.is_dir():
        raise CheckpointError(f"there is no checkpoint {found}: name another one with --iteration")
    match = STEP_FOLDER.fullmatch(found.absolute().name)
    return found, int(match[1]) if match else 0


def tensor_name(layer: int, key: str, rank: int) -> str:
    """How a tensor of one rank is called here and in messages."""
    return f"{key} of layer {layer:02d}, tensor rank {rank}"


def neox_place(name: str) -> tuple[int, str] | None:
    """Layer and key of ``sequential.2.attention.dense.weight``."""
    match = SEQUENTIAL.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


class RankTensors:
    """The tensors of every tensor rank in ``folder``, memory-mapped.

    ``place`` tells layer and key of a name in a file that has all layers; None: it is no name of a model's.

    Attributes:
        folder: where they are.
        ranks: how many tensor ranks wrote it.
        keys: by layer, the names of its tensors without the layer.
        found: by :func:`tensor_name`, what is there.

    Raises:
        CheckpointError: there are no weights, or a file is missing, damaged or of another form.
    """

    def __init__(self, folder: Path, place: Place = neox_place) -> None:
        self.folder, self._place = folder, place
        self._by_layer = any(LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())
        files = _files(folder, LAYER_FILE if self._by_layer else RANK_FILE)
        self.ranks = 1 + max(rank for _, rank in files)
        self._check_complete(files)
        self._tensors = lru_cache(maxsize=self.ranks)(self._read_file)
        self.keys: dict[int, set[str]] = {}
        self.found: dict[str, Stored] = {}
        self._places: dict[str, tuple[Path, int, int, str]] = {}
        for (number, rank), file in sorted(files.items()):
            for (layer, key), tensor in self._tensors(file, number).items():
                name = tensor_name(layer, key, rank)
                dtype = tensor.dtype if tensor.dtype in READABLE else None
                self.keys.setdefault(layer, set()).add(key)
                self.found[name] = Stored(file, tuple(tensor.shape), dtype)
                self._places[name] = file, number, layer, key

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` (CPU); its memory is the file's."""
        file, number, layer, key = self._places[name]
        return self._tensors(file, number)[layer, key]

    def _read_file(self, file: Path, number: int) -> dict[tuple[int, str], torch.Tensor]:
        """By layer and key, the tensors of ``file``: those of layer ``number``, or of all layers."""
        content = load_pickled(file)
        if not self._by_layer:
            content = content.get("module") if isinstance(content, dict) else None
        if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
            where = "" if self._by_layer else " under 'module'"
            raise CheckpointError(f"{file} has no dictionary of tensors{where}: it is no file of weights")
        if self._by_layer:
            return {(number, key): tensor for key, tensor in content.items()}
        places = {name: self._place(name) for name in content}
        for name, place in places.items():
            if place is None:
                raise CheckpointError(f"{file} has {name}, which is no name of a model's tensor there")
        return {place: content[name] for name, place in places.items() if place is not None}

    def _check_complete(self, files: dict[tuple[int, int], Path]) -> None:
        """Raise unless every layer has a file of every rank."""
        for number in sorted({number for number, _ in files}):
            for rank in range(self.ranks):
                if (number, rank) not in files:
                    kind = f"layer_{number:02d}-model" if self._by_layer else "mp_rank"
                    name = f"{kind}_{rank:02d}{'-' if self._by_layer else '_'}model_states.pt"
                    raise CheckpointError(
                        f"{self.folder} lacks {name}, and other files are of {self.ranks} tensor ranks: copy "
                        "all files of the checkpoint"
                    )


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    """By layer (0 where a file has all) and tensor rank, the files whose names are of ``pattern``."""
    files = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            layer, rank = (0, match[1]) if pattern is RANK_FILE else match.groups()
            files[int(layer), int(rank)] = path
    if files:
        return files
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise CheckpointError(
            f"{folder} was written under ZeRO stage 3, which divides weights over all ranks: load it once "
            "in GPT-NeoX and save it under stage 1"
        )
    raise CheckpointError(
        f"{folder} has no weights: neither layer_*-model_*-model_states.pt nor "
        "mp_rank_*_model_states.pt is there"
    )
