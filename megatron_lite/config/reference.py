"""The reference page of all keys and the JSON schema for editors, both made from the sections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_lite.config.fields import Section
from megatron_lite.config.neox import ALIASES, REFUSED, RETIRED, Unused
from megatron_lite.config.older_keys import FUSED_GELU, REWRITTEN
from megatron_lite.config.schema import SECTIONS

INTRODUCTION = """\
# Configuration keys

A configuration is a flat YAML file. `-` and `_` are the same in a key; a dotted key (`optimizer.params.lr`)
changes one value inside a block. Later files override earlier ones, `--set key=value` overrides all, and each
override is printed. `null` takes a key back to its default. An unknown key is an error.

This page is generated from the code by `python tools/config_reference.py`. For completion in an editor, begin
a file with `# yaml-language-server: $schema=../docs/configuration.schema.json`.
"""


def markdown() -> str:
    """The reference page."""
    parts = [INTRODUCTION]
    for name, section in SECTIONS.items():
        rows = [_row(key, schema) for key, schema in _properties(section)]
        summary = " ".join((section.__doc__ or "").split())
        parts.append(
            f"## {name}\n\n{summary}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
            + "".join(rows)
        )
    second = "".join(f"| `{key}` | `{target}` |\n" for key, target in ALIASES.items())
    second += "".join(f"| `{key}` | {meaning} |\n" for key, meaning in REWRITTEN.items())
    parts.append(f"## Second names\n\n| key | is |\n|---|---|\n{second}")
    parts.append(
        "## Retired keys\n\nAccepted, without effect; the run says so when the value asks for something.\n\n"
        + _reasons(RETIRED)
    )
    parts.append(
        "## Keys of features that are not there\n\nRefused, unless the value asks for nothing.\n\n"
        + _reasons(REFUSED)
    )
    return "\n".join(parts)


def json_schema() -> str:
    """The JSON schema (2020-12) of a configuration file."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for section in SECTIONS.values():
        schema = section.model_json_schema()
        definitions |= schema.get("$defs", {})
        properties |= schema["properties"]
    for key in ALIASES:
        properties[key] = {"description": f"Second name of {ALIASES[key]}.", "deprecated": True}
    properties[FUSED_GELU] = {"description": REWRITTEN[FUSED_GELU], "deprecated": True}
    for key, unused in (RETIRED | REFUSED).items():
        properties[key] = {"description": f"Has no effect: {unused.why}.", "deprecated": True}
    blocks = "|".join(key for key, value in properties.items() if _is_block(value))
    result = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A megatron_lite configuration",
        "type": "object",
        "properties": {key: _described(value) for key, value in properties.items()},
        "patternProperties": {f"^({blocks})\\.": {}, "-": {}},
        "additionalProperties": False,
        "$defs": {name: _definition(value) for name, value in definitions.items()},
    }
    return json.dumps(result, indent=2) + "\n"


def _properties(section: type[Section]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of ``section``, blocks followed by the dotted keys within them, with its JSON schema."""
    schema = section.model_json_schema()
    yield from _walk("", schema["properties"], schema.get("$defs", {}))


def _walk(
    prefix: str, properties: dict[str, Any], definitions: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, schema in properties.items():
        yield prefix + key, schema
        reference = schema.get("$ref", "").rpartition("/")[2]
        if reference:
            yield from _walk(f"{prefix}{key}.", definitions[reference]["properties"], definitions)


def _row(key: str, schema: dict[str, Any]) -> str:
    meaning = " ".join(schema.get("description", "").split())
    cells = (f"`{key}`", _value(schema), _default(schema), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _default(schema: dict[str, Any]) -> str:
    if "derived" in schema:
        return schema["derived"]
    if "$ref" in schema:
        return ""
    return f"`{json.dumps(schema['default'])}`" if "default" in schema else "required"


def _value(schema: dict[str, Any]) -> str:
    """What a value may be, in few words."""
    if "enum" in schema:
        return ", ".join(f"`{item}`" for item in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_value(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "prefixItems" in schema:
        items = schema["prefixItems"]
        values = [_value(item) for item in items]
        same = len(set(values)) == 1
        return f"list of {len(items)}, each {values[0]}" if same else f"[{'; '.join(values)}]"
    if schema.get("type") == "array":
        items = schema.get("items", {})
        return f"list of {_value(items)}" if items else "list"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    bounds = ((">", "exclusiveMinimum"), ("≥", "minimum"), ("<", "exclusiveMaximum"), ("≤", "maximum"))
    limits = [f"{sign} {schema[bound]:g}" for sign, bound in bounds if bound in schema]
    return " ".join([names.get(schema.get("type", "block"), "block"), " and ".join(limits)]).strip()


def _reasons(table: dict[str, Unused]) -> str:
    """Keys grouped by the reason that they share."""
    groups: dict[str, list[str]] = {}
    for key, unused in table.items():
        groups.setdefault(unused.why, []).append(f"`{key}`")
    rows = "".join(f"| {', '.join(keys)} | {why} |\n" for why, keys in groups.items())
    return f"| keys | why |\n|---|---|\n{rows}"


def _is_block(schema: dict[str, Any]) -> bool:
    options = [schema, *schema.get("anyOf", [])]
    return any("$ref" in option or option.get("type") == "object" for option in options)


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` as an editor wants it: the rule of a derived key in its description, docstrings on one
    line."""
    result = {key: value for key, value in schema.items() if key not in ("derived", "title")}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "derived" in schema:
        result["description"] += f" Default: {schema['derived']}."
    return result


def _definition(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {key: _described(value) for key, value in schema["properties"].items()}
    return _described(schema) | {"properties": properties}
