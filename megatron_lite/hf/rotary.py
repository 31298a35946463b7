"""Rotary positions as config.json has them: in transformers 5 one dictionary, before it several fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.config.sections.rope import ALLOWED, NEEDED, RopeScaling
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.parts import Part
from megatron_lite.utils.log import LOGGER

ORIGINAL = "original_max_position_embeddings"
BASE, FRACTION = "rope_theta", "partial_rotary_factor"
"""The names in the dictionary."""

WITH_ORIGINAL = ("llama3", "yarn", "longrope")
"""Types that know the longest sequence of the first training. It may stand beside the dictionary, and counts
first there; said nowhere, it is ``max_position_embeddings``."""


UNREAD = ("finetuned", "attn_factor")
"""Keys of published dictionaries that transformers has never read (Yarn-Mistral)."""


@dataclass(frozen=True)
class Rotary(Part):
    """The base of the frequencies, how much of a head turns, how frequencies are scaled for long sequences.

    Attributes:
        base: the field of older releases for the base; ``rope_theta`` may repeat it.
        fraction: likewise for the part of a head that turns, and ``partial_rotary_factor``; None: all of it,
            always.
        default_fraction: what it is when no field says it.
        default_base: likewise the base.
        longrope_names: types that are longrope in this family's older files.
    """

    base: str = BASE
    fraction: str | None = None
    default_fraction: float = 1.0
    default_base: float = 10000.0
    longrope_names: tuple[str, ...] = ()
    keys = ("pos_emb", "rotary_emb_base", "rotary_pct", "rope_scaling")

    def read(self, fields: Fields) -> dict[str, Any]:
        """Base and part. Raises ConfigError for frequencies that are scaled in a way unknown here."""
        # As transformers 5 does: the older name counts first, and what the dictionary lacks is beside it.
        kinds = (dict, type(None))
        found = {name: fields.get(name, None, kinds) for name in ("rope_scaling", "rope_parameters")}
        name = "rope_scaling" if found["rope_scaling"] else "rope_parameters"
        given = dict(found[name] or {})
        base = _agreed(fields, (self.base, BASE), (name, given.pop(BASE, None)), self.default_base)
        fraction = self._fraction(fields, (name, given.pop(FRACTION, None)))
        scaling = self._scaling(fields, given, name)
        return {"pos_emb": "rotary", "rotary_emb_base": _short(base), "rotary_pct": float(fraction)} | scaling

    def _scaling(self, fields: Fields, given: dict[str, Any], name: str) -> dict[str, Any]:
        """``rope_scaling``, of what is left in the dictionary ``name``."""
        kind = given.get("rope_type", given.get("type", "default"))
        if kind in self.longrope_names:
            kind = "longrope"
            given = {key: value for key, value in given.items() if key != "type"} | {"rope_type": kind}
        original = fields.get(ORIGINAL, None, (int, type(None)))
        if kind in WITH_ORIGINAL:
            longest = given.get(ORIGINAL) or fields.get("max_position_embeddings", kind=int)
            given = given | {ORIGINAL: original or longest}
        given = _read_by(kind, given, fields, name)
        try:
            scaling = RopeScaling(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            why = error.errors()[0]
            place = ".".join(map(str, why["loc"])) or "it"
            raise fields.refusal(name, given, f"and {place} cannot be read here: {why['msg']}") from None
        return {} if scaling == RopeScaling() else {"rope_scaling": _plainly(scaling)}

    def _fraction(self, fields: Fields, inside: tuple[str, float | None]) -> float:
        """How much of a head turns; ``inside``: the dictionary's name, and what it says."""
        name = self.fraction or FRACTION
        fraction = _agreed(fields, (name, FRACTION), inside, self.default_fraction)
        if self.fraction is None and fraction != 1:
            raise fields.refusal(name, fraction, "and heads of this family turn as a whole")
        return fraction

    def write(self, model: ModelSection) -> dict[str, Any]:
        """In both spellings: the dictionary, and the flat fields of older releases and other readers."""
        scaling = _plainly(model.rope_scaling)
        parameters = {**scaling, BASE: float(model.rotary_emb_base)}
        flat: dict[str, Any] = {self.base: _short(model.rotary_emb_base)}
        if self.fraction is not None:
            parameters[FRACTION] = flat[self.fraction] = model.rotary_pct
        if scaling["rope_type"] != "default":
            flat["rope_scaling"] = scaling
        return {"rope_parameters": parameters, **flat}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Other positions, or heads that turn in part."""
        if model.pos_emb != "rotary":
            yield f"pos_emb {model.pos_emb}"
        elif self.fraction is None and model.rotary_pct != 1:
            yield f"rotary_pct {model.rotary_pct}"


def _agreed(
    fields: Fields, names: tuple[str, str], inside: tuple[str, float | None], default: float
) -> float:
    """A number that the dictionary or the first field of ``names`` says, above 0; no field says another.

    Args:
        fields: the file.
        names: what it is called beside the dictionary, and by releases that wrote it twice.
        inside: the dictionary's name, and what it says.
        default: the number when nothing says it.
    """
    beside = {name: fields.get(name, None, (int, float, type(None))) for name in names}
    place, number = inside if inside[1] is not None else (names[0], beside[names[0]])
    number = default if number is None else number
    for name, other in beside.items():
        if other not in (None, number):
            raise fields.refusal(name, other, f"and {place} says {number}: correct one of them")
    if not isinstance(number, (int, float)) or number <= 0:
        raise fields.refusal(place, number, f"and {names[1]} must be a number above 0")
    return number


def _read_by(kind: Any, given: dict[str, Any], fields: Fields, name: str) -> dict[str, Any]:
    """What ``kind`` reads of the dictionary ``name``; what transformers leaves unread is told and dropped."""
    if kind not in NEEDED:
        return given
    read = {*NEEDED[kind], *ALLOWED.get(kind, ()), "rope_type", "type"}
    unread = {key for key in given if key not in read and key in {*RopeScaling.model_fields, *UNREAD}}
    if told := sorted(key for key in unread if given[key] is not None):
        LOGGER.warning(
            "%s: %s of type %s is read without %s, as in transformers",
            fields.path,
            name,
            kind,
            ", ".join(told),
        )
    return {key: value for key, value in given.items() if key not in unread}


def _plainly(scaling: RopeScaling) -> dict[str, Any]:
    """What was given of it, JSON-able."""
    return scaling.model_dump(mode="json", exclude_none=True)


def _short(number: float) -> float:
    """A whole number as an int, which GPT-NeoX's configuration has and other readers expect."""
    return int(number) if number == int(number) else number
