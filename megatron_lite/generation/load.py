"""A checkpoint as a model that can write: on one device, without an engine and without other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_lite.checkpoint import find_checkpoint, read_config, read_weights
from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.model import GPT, build_gpt
from megatron_lite.parallel.parameter import DTYPES, ParameterFactory, ParameterSpec, spec_of
from megatron_lite.utils.errors import CheckpointError

META = torch.device("meta")


@dataclass(frozen=True)
class TextModel:
    """What generation needs: the run's configuration, its model in evaluation mode, its tokenizer."""

    config: Config
    gpt: GPT
    tokenizer: Tokenizer


def load_model(
    checkpoint: Path, device: torch.device, dtype: torch.dtype | None = None, step: int | None = None
) -> TextModel:
    """The model of ``checkpoint`` (or the one of ``step``, else the latest, in a folder of checkpoints).

    Weights go to ``device`` one at a time, in ``dtype``: nothing is drawn and nothing is held twice. None is
    the dtype of the run, on a CPU fp32.

    Raises:
        CheckpointError: it is missing or incomplete.
        DataError: its tokenizer's files are missing.
    """
    path = find_checkpoint(checkpoint, step)
    # The training's kernels may not exist on this device, and compiling does not pay for a few tokens.
    config = config_from_keys(read_config(path) | {"attention_backend": "auto", "torch_compile": False})
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else DTYPES[config.precision.precision]
    tokenizer = load_tokenizer(config.data)
    gpt = build_gpt(config, ParameterFactory(config.training.seed, dtype, META))
    weights = {
        name: nn.Parameter(weight.to(device, dtype), requires_grad=False)
        for name, weight in read_weights(path)
    }
    put_weights(gpt, weights)
    return TextModel(config, gpt.eval(), tokenizer)


def put_weights(gpt: GPT, weights: dict[str, nn.Parameter]) -> None:
    """Put ``weights`` (by global name) in the place of the parameters of ``gpt``; tied ones stay one object.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    unused = set(weights)
    for module in gpt.modules():
        for key, parameter in module.named_parameters(recurse=False):
            spec = spec_of(parameter)
            found: list[torch.Tensor] = [_weight(weights, member) for member in spec.members]
            whole = nn.Parameter(torch.stack(found), requires_grad=False) if spec.stack else found[0]
            setattr(module, key, whole)
            unused.difference_update(member.name for member in spec.members)
    if unused:
        raise CheckpointError(f"the model has no place for the checkpoint's {', '.join(sorted(unused))}")


def _weight(weights: dict[str, nn.Parameter], spec: ParameterSpec) -> nn.Parameter:
    weight = weights.get(spec.name)
    if weight is None or weight.shape != spec.shape:
        found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise CheckpointError(f"{spec.name} {found} in the checkpoint; the model's has {spec.shape}")
    return weight
