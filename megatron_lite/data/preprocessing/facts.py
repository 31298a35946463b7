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
        DataError: the file is none.
    """
    path = facts_path(prefix)
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(facts, ensure_ascii=False).encode()  # half a character can be read, but not printed
        if not is_side_file(facts):
            raise ValueError("other keys or values than it has")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not a side file of tools/preprocess_data.py ({error}): move it elsewhere"
        ) from None
    return facts


def is_side_file(facts: Any) -> bool:
    """Whether the values that are used have the types they need; all may be missing."""
    if not isinstance(facts, dict):
        return False
    tokenizer, checksums = facts.get("tokenizer"), facts.get("xxh3_128")
    return (
        isinstance(facts.get("text_bytes"), int | None)
        and (
            tokenizer is None
            or (
                isinstance(tokenizer, dict)
                and all(isinstance(tokenizer.get(key), str) for key in ("tokenizer_type", "fingerprint"))
                and all(isinstance(tokenizer.get(key), str | None) for key in ("vocab_file", "merge_file"))
            )
        )
        and (
            checksums is None
            or (isinstance(checksums, dict) and all(isinstance(value, str) for value in checksums.values()))
        )
    )


def file_checksum(path: Path) -> str:
    """XXH3 of 128 bits of a file's content, in hexadecimal (``xxhsum -H2`` prints the same)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
