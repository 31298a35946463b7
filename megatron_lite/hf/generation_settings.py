"""generation_config.json: an import keeps it, the export of its model writes it back."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.tokenizer_beside import TOKENIZER_FOLDER
from megatron_lite.data.tokenizers import TokenizerKeys
from megatron_lite.data.tokenizers.huggingface import read_tokenizer_config
from megatron_lite.hf.fields import Fields
from megatron_lite.utils.errors import DataError

GENERATION = "generation_config.json"


def keep_settings(folder: Path, fields: Fields, out: Path) -> None:
    """Write the generation settings of the Hugging Face ``folder`` into the import's folder ``out``.

    Without a generation_config.json they are the tokens that end a text by ``fields``, of config.json.

    Raises:
        DataError: generation_config.json is damaged.
    """
    source = folder / GENERATION
    given = source.is_file()
    content = read_tokenizer_config(source) if given else {"eos_token_id": fields.get("eos_token_id", None)}
    _ends(content, source if given else fields.path)
    write_json(out / GENERATION, content)


def exported_settings(
    keys: TokenizerKeys, special: Mapping[str, int | None], padding: Collection[int]
) -> dict[str, Any]:
    """The content of the exported generation_config.json.

    It is what the import kept whose tokenizer ``keys`` name, if it is one's. Another model's tokenizer, used
    for a new model, brings no settings: those of an import lie beside its folder ``tokenizer``, not in it.

    Args:
        keys: of the tokenizer.
        special: ``bos_token_id`` and ``eos_token_id`` by the tokenizer; the latter is always among the tokens
            that end a text.
        padding: ids without text, never to generate.

    Raises:
        DataError: the kept file is damaged.
    """
    file = Path(keys.vocab_file or "")
    folder = file if file.is_dir() else file.parent
    path = folder.parent / GENERATION
    kept = read_tokenizer_config(path) if folder.name == TOKENIZER_FOLDER else {}
    kept.pop("_from_model_config", None)  # transformers would derive the settings from config.json anew
    end, ends = special["eos_token_id"], _ends(kept, path)
    if end not in ends:
        kept["eos_token_id"] = [end, *ends] if ends else end
    if suppressed := sorted({*padding, *(kept.get("suppress_tokens") or [])}):
        kept["suppress_tokens"] = suppressed
    return {**special, **kept}


def _ends(content: dict[str, Any], path: Path) -> list[int]:
    """The ids that end a text, in ``content`` of ``path``."""
    given = content.get("eos_token_id")
    ends = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(end, int) for end in ends):
        raise DataError(f"{path} has eos_token_id {json.dumps(given)}: correct it, to a token id or a list")
    return ends


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
