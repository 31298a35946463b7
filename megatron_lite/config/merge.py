"""Several sources of keys into one: later sources win, and say so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_lite.config.neox import ALIASES
from megatron_lite.config.reader import Entry
from megatron_lite.utils.errors import ConfigError


def merge(sources: Sequence[Sequence[Entry]], messages: list[str]) -> dict[str, Entry]:
    """One entry a key. A later source overrides an earlier one, a dotted key changes one value inside a
    block.

    A null takes a key back to its default. Every change of a value is told in ``messages``. Raises
    :class:`ConfigError` when one source gives a key two values.
    """
    merged: dict[str, Entry] = {}
    for source in sources:
        renamed = [replace(entry, key=ALIASES.get(entry.key, entry.key)) for entry in source]
        in_order = sorted(renamed, key=lambda entry: entry.key.count("."))  # blocks before what changes them
        written: dict[str, Entry] = {}
        for entry in in_order:
            old = _put(written, entry)
            if old is not None and old.value != entry.value:
                raise ConfigError(
                    f"{entry.where}{entry.key} is given twice, {entry.value!r} here and "
                    f"{old.value!r} {old.place}; keep one"
                )
        for entry in in_order:
            old = _put(merged, entry)
            if old is not None and old.value != entry.value:
                messages.append(f"{entry.where}{entry.key} = {entry.value} overrides {old.value} {old.place}")
    return {key: entry for key, entry in merged.items() if entry.value is not None}


def _put(store: dict[str, Entry], entry: Entry) -> Entry | None:
    """Set a key, or a value inside its block; what was there before, if anything."""
    root, *path = entry.key.split(".")
    if not path:
        old = store.get(root)
        store[root] = entry
        return old
    top = store.get(root)
    block = copy.deepcopy(top.value) if top is not None and isinstance(top.value, dict) else {}
    inner: dict[str, Any] = block
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{entry.where}{entry.key}: {part} is {inner!r}, not a block")
    old = replace(top, key=entry.key, value=inner[path[-1]]) if top and path[-1] in inner else None
    inner[path[-1]] = entry.value
    store[root] = Entry(root, block, entry.origin)
    return old
