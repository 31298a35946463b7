"""A new folder of checkpoints of ours from the files of tensor ranks: weights and model.yml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.reader import to_yaml
from megatron_lite.foreign.neox_table import is_idle, table
from megatron_lite.foreign.rank_tensors import RankTensors
from megatron_lite.hf.assemble import MODEL_FILE, left_over, write_checkpoint
from megatron_lite.hf.tokenizer_files import copy_tokenizer
from megatron_lite.hf.whole import whole_folder
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER

TOKENIZER_FOLDER = "tokenizer"


def write_import(
    out: Path,
    keys: Mapping[str, Any],
    tensors: RankTensors,
    origin: str,
    step: int = 0,
    old_grouping: bool | None = None,
    tokenizer: Path | None = None,
) -> Config:
    """Write ``out``, whole or not at all: everything is checked first, then tensors stream.

    Args:
        out: the new folder; must not exist, or be empty.
        keys: of the model, and of its training.
        tensors: its weights.
        origin: what program wrote them, for model.yml's first line.
        step: that the checkpoint is of.
        old_grouping: see :func:`megatron_lite.foreign.neox_table.table`.
        tokenizer: a folder with the tokenizer's files, which are copied.

    Returns:
        The configuration of model.yml.

    Raises:
        ConfigError: the keys do not make a model.
        CheckpointError: weights are missing, left over, of another shape; or ``out`` cannot be written.
    """
    keys = {
        **keys,
        "load": str(out.absolute()),
        "finetune": True,
        "run_dir": f"runs/{out.absolute().name}-finetuned",
    }
    config = config_from_keys(keys)
    rows = table(config.model, tensors, old_grouping)
    left = left_over(rows, config, tensors.found, "the configuration")
    strange = [name for name in left if not is_idle(name, config.model)]
    if strange:
        raise CheckpointError(
            f"{tensors.folder} has {len(strange)} tensor(s) without a place in this model, as {strange[0]}"
        )
    vocabulary = config.data.vocab_file
    if tokenizer is None and vocabulary is not None and not Path(vocabulary).is_file():
        LOGGER.warning("the tokenizer's file %s is not there: correct %s", vocabulary, MODEL_FILE)
    with whole_folder(out) as temporary:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary / TOKENIZER_FOLDER)
        text = f"# {tensors.folder.absolute().name}, imported from {origin}.\n{to_yaml(keys)}"
        (temporary / MODEL_FILE).write_text(text, encoding="utf-8")
        write_checkpoint(temporary, config, rows, tensors.found, tensors.read, step=step)
    return config
