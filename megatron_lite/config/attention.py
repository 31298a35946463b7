"""`attention_config`: a kind of attention for every layer."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.contradiction import Contradiction

KINDS = ("global", "flash", "local")
"""Kinds there are. `flash` is global attention (the name asks for a kernel, which `attention_backend`
chooses); `local` has a window."""

FORM = "attention_config is a list of [[kinds], repeats] pairs such as [[[global], 12]] or [[[global], all]]"


def attention_kinds(pattern: list[Any] | None, num_layers: int) -> tuple[str, ...]:
    """One kind per layer. ``pattern`` repeats lists of kinds a number of times, or over "all" layers.

    A plain list of kinds, one per layer, is taken too. Raises :class:`Contradiction` when the pattern does
    not make ``num_layers`` layers or names a kind that does not exist."""
    if pattern is None:
        return ("global",) * num_layers
    kinds = [kind for entry in pattern for kind in _expand(entry, num_layers)]
    for kind in kinds:
        if kind not in KINDS:
            raise Contradiction(
                f"attention_config names {kind!r}; the kinds of attention are {', '.join(KINDS)}",
                "attention_config",
            )
    if len(kinds) != num_layers:
        raise Contradiction(
            f"attention_config describes {len(kinds)} layers, but num_layers is {num_layers}",
            "attention_config",
            "num_layers",
        )
    return tuple("local" if kind == "local" else "global" for kind in kinds)


def attention_windows(kinds: tuple[str, ...], width: int | None) -> tuple[int | None, ...]:
    """How many keys each layer sees on one side of a query, its own included; None: all. `width` is for local
    layers, without such for all layers."""
    all_local = "local" not in kinds
    return tuple(width if all_local or kind == "local" else None for kind in kinds)


def _expand(entry: Any, num_layers: int) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    match entry:
        case [[*kinds], "all"] if kinds and all(isinstance(kind, str) for kind in kinds):
            if num_layers % len(kinds):
                raise Contradiction(
                    f"attention_config repeats {len(kinds)} kinds over all layers, "
                    f"which does not divide num_layers {num_layers}",
                    "attention_config",
                    "num_layers",
                )
            return kinds * (num_layers // len(kinds))
        case [[*kinds], int(repeats)] if repeats > 0 and all(isinstance(kind, str) for kind in kinds):
            return kinds * repeats
    raise Contradiction(f"{FORM}, got {entry!r}", "attention_config")
