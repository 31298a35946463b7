"""What blocks that are handed to DeepSpeed may hold.

DeepSpeed takes no notice of some wrong keys, and of others every rank dies in a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import AfterValidator

from megatron_lite.config.fields import Block

WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number, 0 or above",
    float: "a number, 0 or above",
    str: "a text",
    dict: "a block of keys",
}
"""What a value of each type is called."""


class InnerKeyError(ValueError):
    """Something is wrong with ``key`` of a block."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def holding(types: Mapping[str, type]) -> AfterValidator:
    """A validator of blocks: only these keys, with values of these types."""

    def check(block: Block) -> Block:
        check_keys(block, types)
        return block

    return AfterValidator(check)


def named(names: str) -> AfterValidator:
    """A validator of blocks: only keys of these ``names``; their values are DeepSpeed's business."""
    return holding(dict.fromkeys(names.split(), object))


def check_keys(block: Mapping[str, Any], types: Mapping[str, type], others: Iterable[str] = ()) -> None:
    """Raise InnerKeyError when ``block`` has a key or a value that it cannot have.

    ``others`` are keys that may be meant, too.
    """
    for key, value in block.items():
        if key not in types:
            raise InnerKeyError(key, unknown(key, [*types, *others]))
        if not _is_a(types[key], value):
            raise InnerKeyError(key, f"{key} should be {WORDS[types[key]]}, got {value!r}")


def unknown(key: str, names: Iterable[str]) -> str:
    """The sentence about a key that none of ``names`` is."""
    return f"there is no key {key}{nearest(key, sorted(names))}"


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?`` with the name most like ``name``, if one is."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _is_a(kind: type, value: Any) -> bool:
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return False
    return kind is float or value == int(value)
