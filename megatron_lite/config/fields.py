"""The types of configuration values, and the base class of every section.

A key is one annotated field with a docstring. Its type, its default, its line in the reference page and its
entry in the JSON schema all come from there."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    """A frozen group of keys, or a nested block: the attributes are the keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


def derived(rule: str) -> Any:
    """A field that :mod:`megatron_lite.config.derive` fills when it is not given; ``rule`` says how, in
    words."""
    return Field(json_schema_extra={"derived": rule})


Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Int = Annotated[int, Strict()]
Positive = Annotated[Int, Field(gt=0)]
Port = Annotated[Int, Field(gt=0, le=65535)]
NonNegative = Annotated[Int, Field(ge=0)]
Float = Annotated[float, Strict(), AllowInfNan(False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Probability = Annotated[Float, Field(ge=0, lt=1)]
Block = dict[str, Any]
