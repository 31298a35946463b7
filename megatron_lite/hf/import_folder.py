"""A Hugging Face folder to a checkpoint of step 0, by a family's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from megatron_lite.checkpoint.tokenizer_beside import TOKENIZER_FOLDER
from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.reader import to_yaml
from megatron_lite.data.tokenizers import load_tokenizer
from megatron_lite.hf.assemble import MODEL_FILE, PRECISIONS, left_over, write_checkpoint
from megatron_lite.hf.families import family_of
from megatron_lite.hf.family import Entry, Family
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.generation_settings import keep_settings
from megatron_lite.hf.stored import StoredTensors
from megatron_lite.hf.tokenizer_files import find_tokenizer
from megatron_lite.hf.transforms import Extended
from megatron_lite.hf.whole import check_free, whole_folder
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER

LENGTH = 2048
"""``seq_length`` at most: a model's longest context is more than most people train with."""


def import_folder(
    folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    ignored: Collection[str] = (),
    rows_multiple: int | None = None,
) -> Config:
    """Write the model in the Hugging Face ``folder`` as ``out``: checkpoint, tokenizer, model.yml.

    ``out`` is written whole or not at all. Everything is checked first; then tensors stream, in the memory of
    one of ours.

    Args:
        folder: config.json, weights (safetensors, or PyTorch's), tokenizer.
        out: the new folder of checkpoints; must not exist, or be empty.
        dtype: of the weights in the checkpoint, and the run's ``precision``; None: as the files have them.
        ignored: fields of config.json that are known to change nothing.
        rows_multiple: add rows to the vocabulary, for all ids of the tokenizer, up to a multiple of this;
            they are the mean of the others. None: the rows stay exactly theirs.

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
    stored = StoredTensors(folder, family.parts_of)
    tokenizer = find_tokenizer(folder)
    keys |= {
        "seq_length": min(keys["max_position_embeddings"], LENGTH),
        "precision": PRECISIONS[dtype or _dtype_of(stored)],
        **tokenizer.moved_to(out.absolute() / TOKENIZER_FOLDER),
        "load": str(out.absolute()),
        "finetune": True,
        "run_dir": f"runs/{out.absolute().name}-finetuned",
    }
    loaded = load_tokenizer(tokenizer)
    _compare_ends(fields, loaded.eod_id)
    rows, ids = keys["vocab_size"], loaded.vocab_size
    if rows_multiple is not None:
        keys |= {"vocab_size": max(rows, ids), "make_vocab_size_divisible_by": rows_multiple}
    elif ids > rows:
        LOGGER.warning(
            "the tokenizer has %d ids and the model rows for %d, with which no training begins: add rows "
            "by --make-vocab-size-divisible-by",
            ids, rows,
        )  # fmt: skip
    config = config_from_keys(keys)
    table = _extended(family.table(config), rows, config.model.padded_vocab_size - rows)
    names = match(family, table, config, stored)
    with whole_folder(out) as temporary:
        tokenizer.write(temporary / TOKENIZER_FOLDER)
        keep_settings(folder, fields, temporary)
        (temporary / MODEL_FILE).write_text(
            f"# {folder.absolute().name}, imported from Hugging Face.\n{to_yaml(keys)}", encoding="utf-8"
        )
        found = {current: stored.found[name] for current, name in names.items()}
        write_checkpoint(temporary, config, table, found, lambda name: stored.read(names[name]), dtype)
    return config


def _compare_ends(fields: Fields, eod: int) -> None:
    """Say that config.json and the tokenizer end a text with different tokens, when they do."""
    given = fields.get("eos_token_id", None, (int, list, type(None)))
    ends = given if isinstance(given, list) else [given]
    if given is not None and eod not in ends:
        LOGGER.warning(
            "%s: a text ends with token %s, by the tokenizer with %d: the tokenizer's counts, for documents "
            "as for generation",
            fields.path,
            " or ".join(map(str, ends)),
            eod,
        )


def _dtype_of(stored: StoredTensors) -> torch.dtype:
    """The dtype of most tensors; fp32 where none is of one that models here compute in."""
    counts = Counter(each.dtype for each in stored.found.values() if each.dtype in PRECISIONS)
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32) or torch.float32


def _extended(table: dict[str, Entry], rows: int, more: int) -> dict[str, Entry]:
    """``table`` where the matrices of the vocabulary get ``more`` rows than their ``rows``."""
    vocabulary = ("embed_in.weight", "embed_out.weight", "embed_out.bias")
    changed = {name: Extended(rows, more) for name in vocabulary if more and name in table}
    return table | {name: replace(table[name], transform=each) for name, each in changed.items()}


def match(family: Family, table: dict[str, Entry], config: Config, stored: StoredTensors) -> dict[str, str]:
    """By name in the family's table, the name in the files; all tensors are there, in the right shapes.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a dtype that is no float.
    """
    names: dict[str, str] = {}
    for name in filter(lambda each: not family.passes_over(each), stored.found):
        current = family.current_name(name)
        if current in names:
            other = names[current]
            raise CheckpointError(f"the weights have {other} and {name}, which are the same: remove one")
        names[current] = name
    (embedding,) = table["embed_in.weight"].theirs
    if "embed_out.weight" not in table and embedding not in names and family.tied_head in names:
        names[embedding] = names.pop(family.tied_head)  # the one matrix, under its other name
    found = {current: stored.found[name] for current, name in names.items()}
    left = {name: names[name] for name in left_over(table, config, found, "config.json")}
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
    head = stored.read(left[family.tied_head])
    embedding = stored.read(names[table["embed_in.weight"].theirs[0]])
    if not torch.equal(head, embedding.to(head.dtype)):
        raise CheckpointError(
            f"the weights have {family.tied_head}, other than the embedding, and config.json says that they "
            "are one (tie_word_embeddings): correct it"
        )
    del left[family.tied_head]
