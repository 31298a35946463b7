"""A Hugging Face folder to a checkpoint of step 0, by a family's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import reduce
from pathlib import Path

import torch

import megatron_lite
from megatron_lite.checkpoint.engine_state import COUNTERS
from megatron_lite.checkpoint.files import Item, write_file
from megatron_lite.checkpoint.folder import TEMPORARY, checkpoint_name
from megatron_lite.checkpoint.index import WEIGHT, Index, tensor_key
from megatron_lite.checkpoint.save import (
    Written,
    make_empty,
    optimizer_file,
    publish,
    weights_file,
    whole_index,
)
from megatron_lite.checkpoint.verification import model_shapes
from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.reader import to_yaml
from megatron_lite.data.tokenizers import load_tokenizer
from megatron_lite.hf.families import family_of
from megatron_lite.hf.family import Entry, Family
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.stored import StoredTensors
from megatron_lite.hf.tokenizer_files import copy_tokenizer, find_tokenizer
from megatron_lite.hf.whole import check_free, whole_folder
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER

MODEL_FILE = "model.yml"
"""The keys of the imported model, beside the checkpoint."""

TOKENIZER_FOLDER = "tokenizer"

LENGTH = 2048
"""``seq_length`` at most: a model's longest context is more than most people train with."""

PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}


def import_folder(
    folder: Path, out: Path, dtype: torch.dtype | None = None, ignored: Collection[str] = ()
) -> Config:
    """Write the model in the Hugging Face ``folder`` as ``out``: checkpoint, tokenizer, model.yml.

    ``out`` is written whole or not at all. Everything is checked first; then tensors stream, in the memory of
    one of ours.

    Args:
        folder: config.json, weights (safetensors, or PyTorch's), tokenizer.
        out: the new folder of checkpoints; must not exist, or be empty.
        dtype: of the weights in the checkpoint, and the run's ``precision``; None: as the files have them.
        ignored: fields of config.json that are known to change nothing.

    Returns:
        The configuration of model.yml.

    Raises:
        ConfigError: config.json says something that a model here cannot be.
        CheckpointError: weights are missing, left over, of another shape, damaged; or ``out`` cannot be
            written.
        DataError: there is no tokenizer that can be read.
        UserError: ``out`` has content.
    """
    check_free(out)
    fields = Fields(folder / "config.json")
    family = family_of(fields.get("model_type"))
    keys = family.keys(fields)
    fields.check_all_read(ignored)
    stored = StoredTensors(folder)
    tokenizer = find_tokenizer(folder)
    keys |= {
        "seq_length": min(keys["max_position_embeddings"], LENGTH),
        "precision": PRECISIONS[dtype or _dtype_of(stored)],
        **tokenizer.moved_to(out.absolute() / TOKENIZER_FOLDER),
        "load": str(out.absolute()),
        "finetune": True,
        "run_dir": f"runs/{out.absolute().name}-finetuned",
    }
    config = config_from_keys(keys)
    ids = load_tokenizer(tokenizer).vocab_size
    if ids > config.model.padded_vocab_size:
        LOGGER.warning(
            "the tokenizer has %d ids and the model rows for %d: training refuses texts with the others",
            ids, config.model.padded_vocab_size,
        )  # fmt: skip
    names = match(family, config, stored)
    with whole_folder(out) as temporary:
        copy_tokenizer(folder, temporary / TOKENIZER_FOLDER)
        (temporary / MODEL_FILE).write_text(
            f"# {folder.absolute().name}, imported from Hugging Face.\n{to_yaml(keys)}", encoding="utf-8"
        )
        _write_checkpoint(temporary, config, family, stored, names, dtype)
    return config


def _dtype_of(stored: StoredTensors) -> torch.dtype:
    """The dtype of most tensors; fp32 where none is of one that models here compute in."""
    counts = Counter(each.dtype for each in stored.found.values() if each.dtype in PRECISIONS)
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32) or torch.float32


def match(family: Family, config: Config, stored: StoredTensors) -> dict[str, str]:
    """By name in the family's table, the name in the files; all tensors are there, in the right shapes.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a dtype that is no float.
    """
    table, shapes = family.table(config), model_shapes(config)
    assert table.keys() == shapes.keys(), table.keys() ^ shapes.keys()
    names: dict[str, str] = {}
    for name in filter(lambda each: not family.passes_over(each), stored.found):
        current = family.current_name(name)
        if current in names:
            other = names[current]
            raise CheckpointError(f"the weights have {other} and {name}, which are the same: remove one")
        names[current] = name
    left = dict(names)
    for ours, entry in table.items():
        expected = entry.transform.to_theirs(torch.empty(shapes[ours], device="meta"))
        for name, tensor in zip(entry.theirs, expected, strict=True):
            if name not in left:
                raise CheckpointError(f"the weights lack {name} (for {ours}): fetch all files of the model")
            found = stored.found[left.pop(name)]
            if found.shape != tensor.shape:
                raise CheckpointError(
                    f"{found.file} has {name} of shape {list(found.shape)}, and by config.json it is "
                    f"{list(tensor.shape)}: the two are of different models"
                )
            if found.dtype not in PRECISIONS:
                raise CheckpointError(
                    f"{found.file} has {name} in a dtype other than fp32, bf16 or fp16: use a folder that is "
                    "not quantised"
                )
    _check_tied_head(family, table, left, names, stored)
    if left:
        raise CheckpointError(
            f"the weights have {len(left)} tensors without a place in a {family.name} model of this "
            f"config.json, the first is {next(iter(left.values()))}"
        )
    return names


def _check_tied_head(
    family: Family,
    table: dict[str, Entry],
    left: dict[str, str],
    names: dict[str, str],
    stored: StoredTensors,
) -> None:
    """Take the head out of ``left`` where it is the embedding, written twice."""
    if family.tied_head not in left:
        return
    embedding = names[table["embed_in.weight"].theirs[0]]
    if not torch.equal(stored.read(left[family.tied_head]), stored.read(embedding)):
        raise CheckpointError(
            f"the weights have {family.tied_head}, other than the embedding, and config.json says that they "
            "are one (tie_word_embeddings): correct it"
        )
    del left[family.tied_head]


def _write_checkpoint(
    folder: Path,
    config: Config,
    family: Family,
    stored: StoredTensors,
    names: dict[str, str],
    dtype: torch.dtype | None,
) -> None:
    """Write ``folder/global_step0``: one rank's files, weights only, and ``latest``."""
    shapes = model_shapes(config)
    items: list[Item] = []
    written = Written([], [], {})
    for ours, entry in family.table(config).items():
        count = torch.Size(shapes[ours]).numel()
        found = [stored.found[names[name]].dtype or torch.float32 for name in entry.theirs]
        kind = dtype or reduce(torch.promote_types, found)
        read = _reader(entry, stored, names, kind)
        items.append(Item(tensor_key(ours, WEIGHT, 0, count, None), kind, count, read))
        name = str(kind).removeprefix("torch.")
        written.pieces.append((ours, WEIGHT, shapes[ours], name, 0, 0, count, None))
    target = folder / checkpoint_name(0)
    temporary = folder / f"{TEMPORARY}{target.name}"
    make_empty(temporary)
    written.files.append(write_file(weights_file(temporary, 0), items, {}))
    written.files.append(write_file(optimizer_file(temporary, 0), [], {}))
    publish(temporary, target, whole_index(_head(config), [written]))


def _reader(
    entry: Entry, stored: StoredTensors, names: dict[str, str], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """What reads the tensor of ``entry`` when its turn to be written has come."""

    def read() -> torch.Tensor:
        ours = entry.transform.to_ours([stored.read(names[name]) for name in entry.theirs]).to(dtype)
        if dtype == torch.float16 and not ours.isfinite().all():
            raise CheckpointError(f"{entry.ours} has values that fp16 cannot hold: convert to bf16 or fp32")
        return ours.reshape(-1)

    return read


def _head(config: Config) -> Index:
    """The index of a run that has not begun."""
    counters = {"step": 0, "samples": 0, "tokens": 0}
    engine, versions = dict.fromkeys(COUNTERS, 0), {"megatron_lite": megatron_lite.__version__}
    return Index(0, 1, "none (imported)", counters, config.flat(), engine, {}, versions, [], {})
