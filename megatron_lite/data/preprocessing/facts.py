"""The side file of a token file: what it was made of and by, and checksums of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import write_text

READ_BYTES = 4 << 20


def facts_path(prefix: Path) -> Path:
    """``PREFIX.json``."""
    return prefix.with_name(prefix.name + ".json")


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write ``facts`` to ``path``, whole or not at all."""
    write_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def read_facts(prefix: Path) -> dict[str, Any] | None:
    """What the side file of ``prefix`` says; None if there is none.

    Raises:
        DataError: the file is no JSON object.
    """
    path = facts_path(prefix)
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is not a side file of tools/preprocess_data.py ({error}): delete it"
        ) from None
    if not isinstance(facts, dict):
        raise DataError(f"{path} is not a side file of tools/preprocess_data.py: delete it")
    return facts


def file_checksum(path: Path) -> str:
    """XXH3 of 128 bits of a file's content, in hexadecimal (``xxhsum -H2`` prints the same)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
