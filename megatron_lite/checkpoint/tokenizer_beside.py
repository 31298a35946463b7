"""The tokenizer of a checkpoint whose folder was moved: an import's files lie beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.utils.log import LOGGER

TOKENIZER_FOLDER = "tokenizer"
"""Folder beside the checkpoints of an import, with the tokenizer's files."""


def with_tokenizer_beside(keys: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The saved ``keys`` of ``checkpoint``, with the tokenizer's files beside it where theirs are gone.

    They are gone when the folder was moved, or copied to another machine: the keys have absolute paths. Only
    a path that ended in ``tokenizer/NAME`` is looked for, in ``tokenizer/NAME`` beside the checkpoint: other
    files of that name would be other tokenizers'. What is not there either stays as it is, to be named in
    the error of who reads it.
    """
    changed = dict(keys)
    for key in ("vocab_file", "merge_file"):
        stored = keys.get(key)
        if stored is None or Path(stored).exists() or Path(stored).parent.name != TOKENIZER_FOLDER:
            continue
        beside = checkpoint.absolute().parent / TOKENIZER_FOLDER / Path(stored).name
        if beside.exists():
            LOGGER.info("%s %s is no longer there: reading %s", key, stored, beside)
            changed[key] = str(beside)
    return changed
