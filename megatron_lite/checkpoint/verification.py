"""Whether a checkpoint is sound: files as they were written, every element there, every value a number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_lite.checkpoint.files import DTYPES, ElementReader, check_file
from megatron_lite.checkpoint.folder import find_checkpoint
from megatron_lite.checkpoint.index import Index, tensor_key
from megatron_lite.checkpoint.load import check_model
from megatron_lite.config import Config, config_from_keys
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory, spec_of
from megatron_lite.utils.errors import CheckpointError, ConfigError

META = torch.device("meta")
BLOCK = 1 << 16  # elements that are looked at together: they stay in the cache
OF_A_RUN = "num_layers"
"""A key that the configuration of every run has; a caller of ``save_checkpoint`` may have others, or none."""


def verify(path: Path) -> None:
    """Raise :class:`CheckpointError` with the first of :func:`find_problems`, if there is one.

    ``path`` is a checkpoint, or a folder of checkpoints with ``latest``.
    """
    checkpoint = find_checkpoint(path)
    for problem in find_problems(ElementReader.of(checkpoint)):
        raise CheckpointError(problem)


def find_problems(reader: ElementReader) -> Iterator[str]:
    """What is wrong with the checkpoint, one sentence each, naming the file or the parameter.

    That the index is sound and covers each tensor exactly once is known once it could be read. Then: that the
    parameters are those of the model that the configuration describes (that it cannot be understood is a
    problem, too); that each has the optimizer state that others have; size and checksum of every file; that
    the files hold what the index says and nothing else; that no value is NaN or infinite. Reads each file
    twice, in bounded memory.
    """
    index, checkpoint = reader.index, reader.checkpoint
    yield from _model(index, checkpoint)
    yield from _optimizer_state(index, checkpoint)
    sound = set()
    for number, entry in enumerate(index.files):
        try:
            check_file(checkpoint, entry)
            sound.add(number)
        except CheckpointError as error:
            yield str(error)
    holding, expected = set(), _expected(index)
    for number in sorted(sound):
        problems = list(_contents(reader, number, expected[number]))
        yield from problems
        if not problems:
            holding.add(number)
    yield from _values(reader, holding)


def model_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """By global name, the whole shape of each parameter of the model that ``config`` describes."""
    model = build_gpt(config, ParameterFactory(config.training.seed, device=META))
    return {spec.name: spec.shape for p in model.parameters() for spec in spec_of(p).members}


def _model(index: Index, checkpoint: Path) -> Iterator[str]:
    if OF_A_RUN not in index.config:
        return  # a model of the caller's own
    try:
        model = model_shapes(config_from_keys(index.config))
    except ConfigError as error:
        yield (
            f"the parameters of {checkpoint} could not be checked against the model: this version does not "
            f"understand the configuration ({error}); verify it with the version that wrote it, "
            f"{index.versions.get('megatron_lite', 'which it does not name')}"
        )
        return
    try:
        check_model(model, index, checkpoint)
    except CheckpointError as error:
        yield str(error)


def _optimizer_state(index: Index, checkpoint: Path) -> Iterator[str]:
    """Parameters with a part of the optimizer state that others have.

    No optimizer keeps for some parameters (Muon's matrices, Adafactor's vectors) a part of what it keeps for
    others. A run trains all its parameters; one that a caller of ``save_checkpoint`` froze has no state.
    """
    known = {frozenset(parameter.state_kinds) for parameter in index.parameters.values()}
    for name, parameter in index.parameters.items():
        own = parameter.state_kinds
        more = [kinds for kinds in known if own < kinds]
        if more and (own or OF_A_RUN in index.config):
            least = min(sorted(kinds) for kinds in more)
            yield (
                f"the optimizer state of {name} in {checkpoint} is incomplete: it has "
                f"{', '.join(sorted(own)) or 'none'}, and other parameters have {', '.join(least)}; use an "
                "earlier checkpoint, or load the weights only (no_load_optim)"
            )


Contents = dict[str, tuple[str, list[int]]]
"""By key, safetensors' name of the dtype and the shape of what a file has."""


def _expected(index: Index) -> list[Contents]:
    """By file, what the index says is in it."""
    files: list[Contents] = [{} for _ in index.files]
    for name, parameter in index.parameters.items():
        for kind, entry in parameter.tensors.items():
            dtype = DTYPES[getattr(torch, entry.dtype)]
            for piece in entry.pieces:
                key = tensor_key(name, kind, piece.start, piece.stop, piece.region)
                files[piece.file][key] = (dtype, [piece.stop - piece.start])
    return files


def _contents(reader: ElementReader, number: int, expected: Contents) -> Iterator[str]:
    """Whether file ``number`` holds the pieces that the index says, and no others."""
    path = reader.checkpoint / reader.index.files[number].name
    stored = reader.contents(number)
    for key in sorted(expected.keys() | stored.keys()):
        if key not in stored:
            yield f"{path} lacks {key}, which the index says it has"
        elif key not in expected:
            yield f"{path} has {key}, which the index does not know"
        elif stored[key] != expected[key]:
            yield f"{path} has {key} as {stored[key]}, and the index says {expected[key]}"


def _values(reader: ElementReader, files: set[int]) -> Iterator[str]:
    """Tensors, and numbers of the optimizer's state, that are not finite; looks into ``files`` only."""
    for name, parameter in reader.index.parameters.items():
        for kind, entry in parameter.tensors.items():
            pieces = [piece for piece in entry.pieces if piece.file in files]
            wrong = sum(
                int((~block.isfinite()).sum())
                for piece in pieces
                for chunk in reader.chunks(name, kind, piece)
                for block in chunk.split(BLOCK)  # what is worked out of it is as large as it
            )
            if wrong:
                yield (
                    f"{kind} of {name} in {reader.checkpoint} has {wrong:,} values of "
                    f"{math.prod(entry.shape):,} that are NaN or infinite: use an earlier checkpoint"
                )
        for kind, number in parameter.scalars.items():
            if not math.isfinite(number):
                yield f"{kind} of {name} in {reader.checkpoint} is {number}: use an earlier checkpoint"
