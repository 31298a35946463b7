"""A checkpoint to a Hugging Face folder, by a family's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megatron_lite.checkpoint import find_checkpoint, read_config, read_weights
from megatron_lite.checkpoint.tokenizer_beside import with_tokenizer_beside
from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.hf.families import choose_family
from megatron_lite.hf.family import Family
from megatron_lite.hf.generation_settings import GENERATION, exported_settings, write_json
from megatron_lite.hf.shards import write_shards
from megatron_lite.hf.tokenizer_files import write_tokenizer
from megatron_lite.hf.whole import whole_folder
from megatron_lite.utils.errors import CheckpointError

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def to_hf(
    family: Family, config: Config, tensors: NamedTensors, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our ``tensors`` (fp32, by global name) under the family's names, in ``dtype``, one at a time.

    Rows that pad the vocabulary stay, so that the family's probabilities are the trained ones.

    Raises:
        CheckpointError: a tensor has no place in the family, one of the family's is missing, or a value does
            not fit into ``dtype``.
    """
    table = family.table(config)
    for name, tensor in tensors:
        entry = table.pop(name, None)
        if entry is None:
            raise CheckpointError(f"the checkpoint's tensor {name} has no place in the {family.name} family")
        converted = tensor.to(dtype)
        if dtype == torch.float16 and not converted.isfinite().all():
            raise CheckpointError(f"{name} has values that fp16 cannot hold: convert to bf16 or fp32")
        yield from zip(entry.theirs, entry.transform.to_theirs(converted), strict=True)
    if table:
        raise CheckpointError(
            f"the checkpoint lacks {len(table)} tensors of the model, the first is {next(iter(table))}"
        )


def export_folder(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 5 * 10**9,
    family: str | None = None,
) -> None:
    """Write ``checkpoint`` (or the latest in a folder of checkpoints) as the Hugging Face folder ``out``.

    See :func:`write_folder`. Raises :class:`CheckpointError` when the checkpoint is missing or incomplete.
    """
    path = find_checkpoint(checkpoint)
    config = config_from_keys(with_tokenizer_beside(read_config(path), path))
    tokenizer = load_tokenizer(config.data)
    write_folder(out, config, read_weights(path), tokenizer, dtype, max_shard_size, family)


def write_folder(
    out: Path,
    config: Config,
    tensors: NamedTensors,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 5 * 10**9,
    family: str | None = None,
) -> None:
    """Write config, weights, tokenizer and stop token as a folder that transformers' Auto classes load.

    It is written whole or not at all.

    Args:
        out: must not exist, or be an empty folder.
        config: describes the model.
        tensors: the model's, fp32, by global name.
        tokenizer: the model's.
        dtype: of the weights on disk.
        max_shard_size: bytes of a weights file at most; as much memory is used.
        family: its ``model_type``; None: the first that can express the model.

    Raises:
        ConfigError: no family can express the model.
        CheckpointError: tensors are missing or left over, or do not fit into ``dtype``.
        DataError: transformers cannot express the tokenizer.
        UserError: ``out`` has content.
    """
    chosen = choose_family(config, family)
    with whole_folder(out) as folder:
        special = write_tokenizer(config.data, tokenizer, folder)
        name = str(dtype).removeprefix("torch.")
        # transformers 5 reads dtype, older releases and other readers torch_dtype.
        dtypes = {"dtype": name, "torch_dtype": name}
        # Ids of the vocabulary's padding have no text.
        padding = range(tokenizer.vocab_size, config.model.padded_vocab_size)
        settings = exported_settings(config.data, special, padding)
        write_json(folder / GENERATION, settings)
        special["eos_token_id"] = settings["eos_token_id"]
        write_json(folder / "config.json", {**chosen.config(config), **special, **dtypes})
        write_shards(to_hf(chosen, config, tensors, dtype), folder, max_shard_size)
