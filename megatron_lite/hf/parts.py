"""What a family's config.json says, part by part: each reads fields into our keys, and writes them back."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.fields import ABSENT, Fields
from megatron_lite.utils.log import LOGGER

ATTENTION_BIASES = ("use_bias_in_qkv", "use_bias_in_attn_output")


class Part:
    """Some fields of a config.json, and the keys that say the same."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the model that this part speaks of."""
        return ()

    def read(self, fields: Fields) -> dict[str, Any]:
        """Keys with their values. Raises ConfigError for what we cannot compute."""
        return {}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """Fields with their values."""
        return {}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """What of ``model`` it cannot write, as the end of a sentence that begins with "it cannot have"."""
        yield from ()


@dataclass(frozen=True)
class Same(Part):
    """A field and a key with the same value.

    Attributes:
        theirs: the field.
        ours: the key.
        default: what transformers takes when the field is absent (or null).
    """

    theirs: str
    ours: str
    default: Any = ABSENT

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.ours,)

    def read(self, fields: Fields) -> dict[str, Any]:
        """The field's value."""
        value = fields.get(self.theirs, self.default)
        return {self.ours: self.default if value is None else value}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The key's value."""
        return {self.theirs: getattr(model, self.ours)}


@dataclass(frozen=True)
class Choice(Part):
    """A field and a key that name the same things by other words.

    Attributes:
        theirs: the field.
        ours: the key.
        to_ours: their word → ours.
        to_theirs: our word → theirs.
        default: their word when the field is absent.
    """

    theirs: str
    ours: str
    to_ours: Mapping[Any, Any]
    to_theirs: Mapping[Any, Any]
    default: Any = ABSENT

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.ours,)

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our word for theirs."""
        value = fields.get(self.theirs, self.default)
        if not isinstance(value, Hashable) or value not in self.to_ours:
            known = ", ".join(map(str, self.to_ours))
            raise fields.refusal(
                self.theirs, value, f"and {self.ours} here cannot be that: it can be {known}"
            )
        return {self.ours: self.to_ours[value]}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """Their word for ours."""
        return {self.theirs: self.to_theirs[getattr(model, self.ours)]}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """That there is no word for it."""
        if getattr(model, self.ours) not in self.to_theirs:
            yield f"{self.ours} {getattr(model, self.ours)}"


@dataclass(frozen=True)
class Always(Part):
    """What the family always is: our keys have these values, and no field says it."""

    values: Mapping[str, Any]

    @property
    def keys(self) -> tuple[str, ...]:
        """Those with values."""
        return tuple(self.values)

    def read(self, fields: Fields) -> dict[str, Any]:
        """The values."""
        return dict(self.values)

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Other values."""
        for key, value in self.values.items():
            if getattr(model, key) != value:
                yield f"{key} {getattr(model, key)}"


@dataclass(frozen=True)
class Demanded(Part):
    """A field that can say what no key of ours says: it must have this value, which is also written."""

    theirs: str
    value: Any
    default: Any = ABSENT

    def read(self, fields: Fields) -> dict[str, Any]:
        """Nothing, if the value is right."""
        found = fields.get(self.theirs, self.default)
        if found != self.value:
            raise fields.refusal(self.theirs, found, f"and models here are as {self.value!r} says")
        return {}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The value."""
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Unread(Part):
    """Fields in published files of the family that transformers does not read."""

    theirs: tuple[str, ...]

    def read(self, fields: Fields) -> dict[str, Any]:
        """Nothing, whatever they say."""
        for name in self.theirs:
            fields.get(name, None)
        return {}


@dataclass(frozen=True)
class AttentionBias(Part):
    """One field for the biases of queries, keys and values, and of the output."""

    default: bool
    theirs: str = "attention_bias"
    keys = ATTENTION_BIASES

    def read(self, fields: Fields) -> dict[str, Any]:
        """The same for both."""
        return dict.fromkeys(self.keys, fields.get(self.theirs, self.default, bool))

    def write(self, model: ModelSection) -> dict[str, Any]:
        """What both have."""
        return {self.theirs: model.use_bias_in_qkv}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """That they differ."""
        if model.use_bias_in_qkv != model.use_bias_in_attn_output:
            yield f"use_bias_in_attn_output {model.use_bias_in_attn_output}"


@dataclass(frozen=True)
class AllBiases(Part):
    """One field for the biases of attention and MLP."""

    theirs: str
    keys = (*ATTENTION_BIASES, "use_bias_in_mlp")

    def read(self, fields: Fields) -> dict[str, Any]:
        """The same for all; they are there unless the field says otherwise."""
        return dict.fromkeys(self.keys, fields.get(self.theirs, True, bool))

    def write(self, model: ModelSection) -> dict[str, Any]:
        """What all have."""
        return {self.theirs: model.use_bias_in_mlp}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """That they differ."""
        for key in ATTENTION_BIASES:
            if getattr(model, key) != model.use_bias_in_mlp:
                yield f"{key} {getattr(model, key)}"


@dataclass(frozen=True)
class Dropouts(Part):
    """A dropout for the outputs of attention and MLP, another for the embedding: here they are one.

    Attributes:
        theirs: the field of the outputs.
        embedding: that of the embedding.
        default: of both.
    """

    theirs: str
    embedding: str
    default: float
    keys = ("hidden_dropout",)

    def read(self, fields: Fields) -> dict[str, Any]:
        """That of the outputs; it is told where the other differs, which no computed number depends on."""
        value, other = (
            fields.get(name, self.default, (int, float)) for name in (self.theirs, self.embedding)
        )
        if value != other:
            LOGGER.warning(
                "%s is %s and %s %s: training here drops as much of both; hidden_dropout is the first",
                self.theirs, value, self.embedding, other,
            )  # fmt: skip
        return {"hidden_dropout": value}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The same for both."""
        return dict.fromkeys((self.theirs, self.embedding), model.hidden_dropout)


@dataclass(frozen=True)
class Vocabulary(Part):
    """Rows of the embedding: theirs exactly, since each was part of the softmax in training."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """As many rows, none added."""
        return {"vocab_size": fields.get("vocab_size", kind=int), "make_vocab_size_divisible_by": 1}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The rows with those that pad."""
        return {"vocab_size": model.padded_vocab_size}


@dataclass(frozen=True)
class InnerWidth(Part):
    """Width of the MLP: ours is three times theirs where it is gated (see ``intermediate_size``).

    Attributes:
        gated: whether it is.
        theirs: the field.
        times_hidden: what the width is without the field, in hidden sizes; None: it must be there.
        hidden: the field with the hidden size.
    """

    gated: bool
    theirs: str = "intermediate_size"
    times_hidden: int | None = None
    hidden: str = "hidden_size"
    keys = ("intermediate_size",)

    def read(self, fields: Fields) -> dict[str, Any]:
        """The width in our measure."""
        width = fields.get(self.theirs, ABSENT if self.times_hidden is None else None, (int, type(None)))
        if width is None:
            width = (self.times_hidden or 0) * fields.get(self.hidden, kind=int)
        return {"intermediate_size": 3 * width if self.gated else width}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The width inside."""
        return {self.theirs: model.ffn_size}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """That it is gated, or not."""
        if model.is_gated != self.gated:
            yield f"activation {model.activation}"


@dataclass(frozen=True)
class KeyHeads(Part):
    """How many heads keys and values have; without the field ``default``, null: as many as queries."""

    theirs: str = "num_key_value_heads"
    default: int | None = None
    keys = ("num_kv_heads",)

    def read(self, fields: Fields) -> dict[str, Any]:
        """The number, or nothing where it is that of the queries."""
        heads = fields.get(self.theirs, self.default, (int, type(None)))
        return {} if heads is None else {"num_kv_heads": heads}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The number."""
        return {self.theirs: model.num_kv_heads}


@dataclass(frozen=True)
class NoKeyHeads(Part):
    """As many key and value heads as query heads, always."""

    keys = ("num_kv_heads",)

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Grouped queries."""
        if model.num_kv_heads != model.num_attention_heads:
            yield f"num_kv_heads {model.num_kv_heads} of {model.num_attention_heads} heads"


@dataclass(frozen=True)
class HeadSize(Part):
    """Width of a head: without the field hidden_size / num_attention_heads, unless the family has a
    ``default``."""

    default: int | None = None
    keys = ("kv_channels",)

    def read(self, fields: Fields) -> dict[str, Any]:
        """The width, if it is another than that."""
        size = fields.get("head_dim", self.default, (int, type(None)))
        hidden, heads = (fields.get(name, kind=int) for name in ("hidden_size", "num_attention_heads"))
        return {} if size is None or size * heads == hidden else {"kv_channels": size}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The width."""
        return {"head_dim": model.head_size}
