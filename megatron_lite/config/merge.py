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
                    f"{entry.where()}{entry.key} is given as {entry.value!r} and as {old.value!r}"
                    f"{_place(old)}; keep one"
                )
        for entry in in_order:
            old = _put(merged, entry)
            if old is not None and old.value != entry.value:
                messages.append(
                    f"{entry.where()}{entry.key} = {entry.value} overrides {old.value}{_place(old)}"
                )
    present = {key: replace(entry, value=_without_nulls(entry.value)) for key, entry in merged.items()}
    return {key: entry for key, entry in present.items() if entry.value is not None}


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}


def _place(entry: Entry) -> str:
    return f" ({entry.origin})" if entry.origin else ""


def _put(store: dict[str, Entry], entry: Entry) -> Entry | None:
    """Set a key, or a value inside its block; what was there before, if anything."""
    root, *path = entry.key.split(".")
    top = store.get(root)
    if not path:
        store[root] = entry
        return top
    top = top if top is not None and isinstance(top.value, dict) else Entry(root, {}, entry.origin)
    block = copy.deepcopy(top.value)
    inner: dict[str, Any] = block
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{entry.where()}{entry.key}: {part} is {inner!r}, not a block of keys")
    last = path[-1]
    old = Entry(entry.key, inner[last], top.inner.get(entry.key, top.origin)) if last in inner else None
    inner[last] = entry.value
    store[root] = Entry(root, block, top.origin, {**top.inner, entry.key: entry.origin})
    return old
