"""A checkpoint as a model that reads and writes, without an engine: on one device, or several together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_lite.checkpoint import find_checkpoint, read_config, read_weights
from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.sections.model import ModelSection
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.model import GPT, build_gpt
from megatron_lite.parallel.parameter import DTYPES, ParameterFactory, ParameterSpec, Shard, spec_of
from megatron_lite.parallel.tensor import ONE_RANK, TensorParallel
from megatron_lite.utils.errors import CheckpointError, ConfigError

META = torch.device("meta")

Weights = dict[tuple[str, Shard | None], nn.Parameter]
"""By global name, and the part of it that it is."""


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
    tensor: TensorParallel = ONE_RANK,
) -> TextModel:
    """The model of ``checkpoint`` (or the one of ``step``, else the latest, in a folder of checkpoints).

    Weights go to ``device`` one at a time, in ``dtype``: nothing is drawn and nothing is held twice. None is
    the dtype of the run, on a CPU fp32. Ranks that share the model (``tensor``) read their parts of it.

    Raises:
        CheckpointError: it is missing or incomplete.
        ConfigError: it cannot be divided over so many ranks.
        DataError: its tokenizer's files are missing.
    """
    path = find_checkpoint(checkpoint, step)
    # The training's kernels may not exist on this device, and compiling does not pay for a few tokens.
    config = config_from_keys(read_config(path) | {"attention_backend": "auto", "torch_compile": False})
    check_divides(config.model, tensor.size)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else DTYPES[config.precision.precision]
    tokenizer = load_tokenizer(config.data)
    gpt = build_gpt(config, ParameterFactory(config.training.seed, dtype, META, tensor=tensor))
    parts: dict[str, list[Shard | None]] = {}
    for parameter in gpt.parameters():
        for member in spec_of(parameter).members:
            parts.setdefault(member.name, []).append(member.shard)
    weights: Weights = {}
    for name, whole in read_weights(path):
        for shard in parts.get(name, [None]):
            part = whole if shard is None else shard.take(whole)
            weights[name, shard] = nn.Parameter(part.to(device, dtype), requires_grad=False)
    put_weights(gpt, weights)
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


def put_weights(gpt: GPT, weights: Weights) -> None:
    """Put ``weights`` in the place of the parameters of ``gpt``; tied ones stay one object.

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
            unused.difference_update((member.name, member.shard) for member in spec.members)
    if unused:
        names = ", ".join(sorted({name for name, _ in unused}))
        raise CheckpointError(f"the model has no place for the checkpoint's {names}")


def _weight(weights: Weights, spec: ParameterSpec) -> nn.Parameter:
    weight = weights.get((spec.name, spec.shard))
    if weight is None or weight.shape != spec.local_shape:
        found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise CheckpointError(f"{spec.name} {found} in the checkpoint; the model's has {spec.local_shape}")
    return weight
