"""What positions ask of the other keys."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.contradiction import Contradiction, Keys
from megatron_lite.config.sections.rope import RopeScaling


def check_positions(keys: Keys) -> dict[str, Any]:
    """Whether the kind of positions fits the widths, and what belongs to another kind."""
    kind, rotating = keys.get("pos_emb", "learned"), rotating_channels(keys)
    if kind == "rotary" and (rotating % 2 or rotating == 0):
        raise Contradiction(
            f"rotary_pct {keys.get('rotary_pct', 1.0)} of heads of width {head_size(keys)} makes {rotating} "
            "rotating dimensions: choose an even number",
            "rotary_pct",
            "num_attention_heads",
        )
    if kind == "sinusoidal" and keys["hidden_size"] % 2:
        raise Contradiction(
            "sinusoidal positions are pairs of a sine and a cosine, but hidden_size "
            f"{keys['hidden_size']} is odd: choose an even number",
            "pos_emb",
            "hidden_size",
        )
    if kind != "learned" and keys.get("opt_pos_emb_offset"):
        raise Contradiction(
            f"opt_pos_emb_offset is a row of learned positions, but pos_emb is {kind}: leave it out",
            "opt_pos_emb_offset",
            "pos_emb",
        )
    return {}


def check_rope_scaling(keys: Keys) -> dict[str, Any]:
    """Whether `rope_scaling` fits the rotation that it changes."""
    scaling: RopeScaling = keys.get("rope_scaling") or RopeScaling()
    if scaling.rope_type == "default":
        return {}
    kind = keys.get("pos_emb", "learned")
    if kind != "rotary":
        raise Contradiction(
            f"rope_scaling changes rotary positions, but pos_emb is {kind}: set pos_emb: rotary, or leave "
            "rope_scaling out",
            "rope_scaling",
            "pos_emb",
        )
    pairs = rotating_channels(keys) // 2
    for name in ("short_factor", "long_factor"):
        factors = getattr(scaling, name)
        if factors is not None and len(factors) != pairs:
            raise Contradiction(
                f"rope_scaling.{name} has {len(factors)} numbers, but a head has {pairs} pairs of rotating "
                "channels: give one number for each",
                "rope_scaling",
                "rotary_pct",
                "num_attention_heads",
                "kv_channels",
            )
    return {}


def rotating_channels(keys: Keys) -> int:
    """Channels of each head that rotate."""
    return int(head_size(keys) * keys.get("rotary_pct", 1.0))


def head_size(keys: Keys) -> int:
    """Width of a head."""
    return int(keys.get("kv_channels") or keys["hidden_size"] // keys["num_attention_heads"])


def check_length(keys: Keys, positions: int) -> None:
    """Raise when sequences are longer than `max_position_embeddings`, here ``positions``.

    Where Hugging Face's `dynamic` would change the frequencies, it is said what that comes to: they change
    with each sequence's length there, which what has been read (a cache of turned keys) could not follow.
    """
    length = keys["seq_length"]
    if length <= positions:
        return
    told = f"max_position_embeddings {positions} is less than seq_length {length}"
    scaling, size = keys.get("rope_scaling"), rotating_channels(keys)
    if scaling is None or scaling.rope_type != "dynamic" or size <= 2:
        raise Contradiction(told, "max_position_embeddings", "seq_length")
    growth = scaling.factor * length / positions - (scaling.factor - 1)
    base = keys.get("rotary_emb_base", 10000) * growth ** (size / (size - 2))
    raise Contradiction(
        f"{told}, and rope_type dynamic has no frequencies of its own there, since they depend on each "
        f"sequence's length: for sequences of {length} tokens it comes to rotary_emb_base: {round(base)} "
        f"without rope_scaling, and max_position_embeddings: {length}",
        "rope_scaling",
        "max_position_embeddings",
        "seq_length",
    )
