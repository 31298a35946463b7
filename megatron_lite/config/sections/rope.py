"""`rope_scaling`: rotary positions for sequences longer than those that the model was first trained with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_lite.config.fields import Bool, Float, Positive, PositiveFloat, Section

Growth = Annotated[Float, Field(ge=1)]

NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The keys that a `rope_type` cannot do without."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "longrope": ("factor", "attention_factor"),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""Those that it may have besides."""

BOUNDS = {
    "llama3": (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)),
    "yarn": (("beta_slow", 1.0), ("beta_fast", 32.0)),
}
"""Pairs of keys of which the first is the smaller, with their defaults."""

ELSEWHERE = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""What Hugging Face has in the same mapping, and the key that it is here."""


class RopeScaling(Section):
    """Hugging Face's `rope_scaling` (`rope_parameters` in its newer files), key by key."""

    rope_type: Literal["default", "dynamic", "linear", "llama3", "longrope", "yarn"] = "default"
    """How the frequencies of the rotation change; `default`: not at all. `type` is its older name. `dynamic`
    changes nothing up to `max_position_embeddings` tokens, and more are refused."""
    factor: Growth | None = None
    """How many times longer the sequences are than before. Needed by all but `default` and `longrope`, where
    it is `max_position_embeddings` / `original_max_position_embeddings` when not given."""
    original_max_position_embeddings: Positive | None = None
    """Longest sequence before. Needed by `llama3`, `longrope` and `yarn`."""
    low_freq_factor: PositiveFloat | None = None
    """`llama3`: frequencies with fewer turns than this in an original sequence are divided by `factor`."""
    high_freq_factor: PositiveFloat | None = None
    """`llama3`: those with more turns than this stay; between both they change smoothly."""
    attention_factor: PositiveFloat | None = None
    """`yarn`, `longrope`: what turned queries and keys are multiplied by. None: as the papers say."""
    beta_fast: PositiveFloat | None = None
    """`yarn`: frequencies with more turns than this in an original sequence stay; None: 32."""
    beta_slow: PositiveFloat | None = None
    """`yarn`: those with fewer turns than this are divided by `factor`; None: 1."""
    mscale: PositiveFloat | None = None
    """`yarn`: with `mscale_all_dim`, how `attention_factor` follows from `factor` (DeepSeek)."""
    mscale_all_dim: PositiveFloat | None = None
    """`yarn`: see `mscale`."""
    truncate: Bool | None = None
    """`yarn`: whether the two bounds are rounded to whole channels; None: true."""
    short_factor: tuple[PositiveFloat, ...] | None = None
    """`longrope`: what each frequency is divided by when `seq_length` is at most
    `original_max_position_embeddings`; one number for each pair of rotating channels."""
    long_factor: tuple[PositiveFloat, ...] | None = None
    """`longrope`: the same when `seq_length` is more."""

    @model_validator(mode="before")
    @classmethod
    def _our_names(cls, block: Any) -> Any:
        """`type` as `rope_type`; what is a key of its own is told."""
        if not isinstance(block, dict):
            return block
        for theirs, ours in ELSEWHERE.items():
            if theirs in block:
                raise ValueError(f"{theirs} is a key of its own here: write {ours} outside of rope_scaling")
        if "type" not in block:
            return block
        named = {key: value for key, value in block.items() if key != "type"}
        if named.setdefault("rope_type", block["type"]) != block["type"]:
            raise ValueError(f"rope_type is {named['rope_type']!r} and type is {block['type']!r}: keep one")
        return named

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        """What the type needs is there, and nothing that it does not read."""
        kind, given = self.rope_type, self.model_dump(exclude_none=True).keys() - {"rope_type"}
        if missing := [key for key in NEEDED[kind] if key not in given]:
            raise ValueError(f"rope_type {kind} needs {' and '.join(missing)} too")
        if unread := sorted(given - {*NEEDED[kind], *ALLOWED.get(kind, ())}):
            raise ValueError(f"rope_type {kind} does not read {' and '.join(unread)}: leave it out")
        if kind in BOUNDS:
            (low, low_default), (high, high_default) = BOUNDS[kind]
            lower, upper = getattr(self, low) or low_default, getattr(self, high) or high_default
            if lower >= upper:
                raise ValueError(f"{low} {lower:g} must be less than {high} {upper:g}")
        return self
