"""A checkpoint to a Hugging Face folder, by a family's table."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint import find_checkpoint, read_config, read_weights
from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.hf.family import Family
from megatron_lite.hf.gpt_neox import GPT_NEOX
from megatron_lite.hf.shards import write_shards
from megatron_lite.utils.errors import CheckpointError, ConfigError, UserError
from megatron_lite.utils.files import fsync_directory

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT_NEOX,)}
"""By ``model_type``. A new family is one file and one name here."""

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def choose_family(config: Config) -> Family:
    """The family that can express ``config``.

    Raises:
        ConfigError: none can; the reasons are told.
    """
    if not config.model.causal:
        raise ConfigError(
            "no Hugging Face family here has attention in both directions (mlm_training): use the checkpoint "
            "itself, or export a model that was trained without mlm_training"
        )
    refusals = []
    for family in FAMILIES.values():
        reasons = list(family.reasons_against(config))
        if not reasons:
            return family
        refusals.append(f"{family.name}: {'; '.join(reasons)}")
    raise ConfigError(f"no Hugging Face family can express this model: {' / '.join(refusals)}")


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
        yield entry.theirs, converted
    if table:
        raise CheckpointError(
            f"the checkpoint lacks {len(table)} tensors of the model, the first is {next(iter(table))}"
        )


def export_folder(
    checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32, max_shard_size: int = 5 * 10**9
) -> None:
    """Write ``checkpoint`` (or the latest in a folder of checkpoints) as the Hugging Face folder ``out``.

    See :func:`write_folder`. Raises :class:`CheckpointError` when the checkpoint is missing or incomplete.
    """
    path = find_checkpoint(checkpoint)
    config = config_from_keys(read_config(path))
    tokenizer = load_tokenizer(config.data)
    write_folder(out, config, read_weights(path), tokenizer, dtype, max_shard_size)


def write_folder(
    out: Path,
    config: Config,
    tensors: NamedTensors,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 5 * 10**9,
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

    Raises:
        ConfigError: no family can express the model.
        CheckpointError: tensors are missing or left over, or do not fit into ``dtype``.
        DataError: transformers cannot express the tokenizer.
        UserError: ``out`` has content.
    """
    family = choose_family(config)
    with _whole_folder(out) as folder:
        special = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}
        name = str(dtype).removeprefix("torch.")
        # transformers 5 reads dtype, older releases and other readers torch_dtype.
        dtypes = {"dtype": name, "torch_dtype": name}
        _write_json(folder / "config.json", {**family.config(config), **special, **dtypes})
        # Ids of the vocabulary's padding have no text.
        padding = list(range(tokenizer.vocab_size, config.model.padded_vocab_size))
        suppressed = {"suppress_tokens": padding} if padding else {}
        _write_json(folder / "generation_config.json", {**special, **suppressed})
        tokenizer.save_pretrained(folder)
        write_shards(to_hf(family, config, tensors, dtype), folder, max_shard_size)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that becomes ``out`` on success and disappears on any error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there: name a new folder, or empty it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        # safetensors makes files that only their owner may read; the folder's mode follows the umask.
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.iterdir():
            file.chmod(mode)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        temporary.rename(out)
        fsync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
