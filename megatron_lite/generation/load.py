"""A checkpoint as a model that reads and writes, without an engine: on one device, or several together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megatron_lite.checkpoint.files import ElementReader
from megatron_lite.checkpoint.index import WEIGHT
from megatron_lite.checkpoint.layouts.layout import region_of
from megatron_lite.checkpoint.load import check_model, find_together
from megatron_lite.checkpoint.read import check_weights
from megatron_lite.checkpoint.together import together
from megatron_lite.checkpoint.tokenizer_beside import with_tokenizer_beside
from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.sections.model import ModelSection
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.model import GPT, build_gpt
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import DTYPES, ParameterFactory, ParameterSpec, spec_of
from megatron_lite.parallel.tensor import TensorParallel
from megatron_lite.utils.errors import ConfigError

META = torch.device("meta")


@dataclass(frozen=True)
class TextModel:
    """What generation needs: the run's configuration, its model in evaluation mode, its tokenizer."""

    config: Config
    gpt: GPT
    tokenizer: Tokenizer


def load_model(
    checkpoint: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    step: int | None = None,
) -> TextModel:
    """The model of ``checkpoint`` (or the one of ``step``, else the latest, in a folder of checkpoints).

    Weights go to ``device`` piece by piece, in ``dtype``: nothing is drawn and nothing is held twice. None
    is the dtype of the run, on a CPU fp32.

    Raises:
        CheckpointError: it is missing or incomplete.
        DataError: its tokenizer's files are missing.
    """
    return load_shared(ParallelContext(0, 1, 0, device), checkpoint, dtype, step)


def load_shared(
    context: ParallelContext,
    checkpoint: Path,
    dtype: torch.dtype | None = None,
    step: int | None = None,
) -> TextModel:
    """:func:`load_model` on several ranks, of which those of a tensor axis share the model; each calls this.

    A rank reads its part of every weight. The checksums of the files are verified first, the ranks sharing
    the work.

    Raises:
        CheckpointError: on every rank alike: it is missing, incomplete or corrupt.
        ConfigError: it cannot be divided over so many ranks.
        DataError: its tokenizer's files are missing.
    """
    path = find_together(context, checkpoint, step)
    reader = ElementReader.of(path)
    # The training's kernels may not exist on this device, and compiling does not pay for a few tokens.
    keys = with_tokenizer_beside(reader.index.config, path)
    config = config_from_keys(keys | {"attention_backend": "auto", "torch_compile": False})
    check_divides(config.model, context.tensor.size)
    if dtype is None:
        dtype = torch.float32 if context.device.type == "cpu" else DTYPES[config.precision.precision]
    tokenizer = load_tokenizer(config.data)
    tensor = TensorParallel(context.tensor)
    gpt = build_gpt(config, ParameterFactory(config.training.seed, dtype, META, tensor=tensor))
    shapes = {spec.name: spec.shape for p in gpt.parameters() for spec in spec_of(p).members}
    check_model(shapes, reader.index, path)
    check_own_files = partial(check_weights, path, reader.index, context.rank, context.world_size)
    together(context, check_own_files, doing="loading")
    read_parameters(gpt, reader, context.device, dtype)
    return TextModel(config, gpt.eval(), tokenizer)


def check_divides(model: ModelSection, ranks: int) -> None:
    """Raise :class:`ConfigError` when so many ``ranks`` cannot share every layer of ``model``."""
    divided = {
        "attention heads": model.num_attention_heads,
        "units of the MLP": model.ffn_size,
        "rows of the vocabulary": model.padded_vocab_size,
    }
    fitting = [number % ranks == 0 for number in divided.values()]
    if not all(fitting) or (model.num_kv_heads % ranks and ranks % model.num_kv_heads):
        numbers = ", ".join(f"{number} {name}" for name, number in divided.items())
        raise ConfigError(
            f"{ranks} ranks cannot share this model's layers ({numbers}, {model.num_kv_heads} key/value "
            "heads): choose a model_parallel_size that divides them all"
        )


def read_parameters(gpt: GPT, reader: ElementReader, device: torch.device, dtype: torch.dtype) -> None:
    """Put what this rank has of the checkpoint's weights in the place of the parameters of ``gpt``.

    Tied parameters stay one object.
    """
    found: dict[ParameterSpec, nn.Parameter] = {}
    for module in gpt.modules():
        for key, parameter in module.named_parameters(recurse=False):
            spec = spec_of(parameter)
            if spec not in found:
                value = torch.empty(spec.local_shape, dtype=dtype, device=device)
                for member, part in zip(spec.members, [value] if spec.stack is None else value, strict=True):
                    reader.read_into(part.view(-1), member.name, WEIGHT, 0, region_of(member))
                found[spec] = nn.Parameter(value, requires_grad=False)
            setattr(module, key, found[spec])
