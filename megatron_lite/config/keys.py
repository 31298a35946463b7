"""One key at a time: does it exist, does it do anything, is its value of the right type?"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatron_lite.config.inner_keys import InnerKeyError, nearest
from megatron_lite.config.neox import ALIASES, REFUSED, RETIRED
from megatron_lite.config.older_keys import FUSED_GELU
from megatron_lite.config.reader import Entry
from megatron_lite.config.schema import SECTION_OF, SECTIONS
from megatron_lite.utils.errors import ConfigError


def has_effect(entry: Entry, messages: list[str]) -> bool:
    """Whether the key does something here. A retired key that asks for something is told in ``messages``.

    Raises :class:`ConfigError` for a key that does not exist or that asks for what is not there.
    """
    root = entry.key.split(".")[0]
    if root in SECTION_OF or root in ALIASES or root == FUSED_GELU:
        return True
    if root in RETIRED:
        if not RETIRED[root].is_neutral(entry.value):
            messages.append(f"{entry.where()}{entry.key} has no effect: {RETIRED[root].why}")
        return False
    if root in REFUSED:
        if not REFUSED[root].is_neutral(entry.value):
            raise ConfigError(f"{entry.where()}{entry.key} cannot be {entry.value!r}: {REFUSED[root].why}")
        return False
    hint = nearest(root, [*SECTION_OF, *ALIASES, *RETIRED, *REFUSED, FUSED_GELU])
    raise ConfigError(
        f"{entry.where()}there is no key {root}{hint or '; docs/configuration.md lists them all'}"
    )


def typed_value(entry: Entry) -> Any:
    """The value of ``entry`` as its field wants it. Raises :class:`ConfigError` when it is of another
    type."""
    try:
        return _adapter(entry.key).validate_python(entry.value)
    except ValidationError as error:
        raise ConfigError(_sentence(entry, error.errors()[0])) from None


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    field = SECTIONS[SECTION_OF[key]].model_fields[key]
    return TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]


def _sentence(entry: Entry, problem: ErrorDetails) -> str:
    """What pydantic found wrong with ``entry``, for a person."""
    parts = [str(part) for part in problem["loc"]]
    key = ".".join([entry.key, *parts])
    if problem["type"] == "extra_forbidden":
        return (
            f"{entry.where(key)}there is no key {key}{nearest(parts[-1], _block_keys(entry.key, parts[:-1]))}"
        )
    if problem["type"] == "value_error":
        error = problem["ctx"]["error"]
        place = f"{key}.{error.key}" if isinstance(error, InnerKeyError) else key
        return f"{entry.where(place)}{key}: {error}"
    return f"{entry.where(key)}{key} {problem['msg'].removeprefix('Input ')}, got {problem['input']!r}"


def _block_keys(key: str, path: list[str]) -> list[str]:
    """The keys of the block ``key.path``."""
    block: Any = SECTIONS[SECTION_OF[key]].model_fields[key].annotation
    for part in path:
        block = block.model_fields[part].annotation
    return list(block.model_fields)
