"""One key at a time: does it exist, does it do anything, is its value of the right type?"""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from megatron_lite.config.neox import ALIASES, REFUSED, RETIRED
from megatron_lite.config.reader import Entry
from megatron_lite.config.schema import SECTION_OF, SECTIONS
from megatron_lite.utils.errors import ConfigError


def has_effect(entry: Entry, messages: list[str]) -> bool:
    """Whether the key does something here. Raises for one that does not exist or asks for what is not
    there."""
    root = entry.key.split(".")[0]
    if root in SECTION_OF or root in ALIASES:
        return True
    if root in RETIRED:
        if not RETIRED[root].is_neutral(entry.value):
            messages.append(f"{entry.where}{entry.key} has no effect: {RETIRED[root].why}")
        return False
    if root in REFUSED:
        if not REFUSED[root].is_neutral(entry.value):
            raise ConfigError(
                f"{entry.where}{entry.key}: {entry.value!r} is not available: {REFUSED[root].why}"
            )
        return False
    near = difflib.get_close_matches(root, [*SECTION_OF, *ALIASES, *RETIRED, *REFUSED], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; docs/configuration.md lists every key"
    raise ConfigError(f"{entry.where}there is no key {root}{hint}")


def typed_value(entry: Entry) -> Any:
    """The value of ``entry`` as its field wants it."""
    field = SECTIONS[SECTION_OF[entry.key]].model_fields[entry.key]
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        return adapter.validate_python(entry.value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([entry.key, *(str(part) for part in first["loc"])])
        problem = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise ConfigError(f"{entry.where}{path} {problem}, got {first['input']!r}") from None
