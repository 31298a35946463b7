"""docs/configuration.md and the JSON schema, made from the sections."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_lite.config.neox import ALIASES, REFUSED, RETIRED
from megatron_lite.config.older_keys import FUSED_GELU, REWRITTEN
from megatron_lite.config.reader import read_file
from megatron_lite.config.schema import SECTION_OF, SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def test_the_generated_files_are_up_to_date() -> None:
    command = [sys.executable, "tools/config_reference.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_every_key_is_described() -> None:
    for section in SECTIONS.values():
        for key, field in section.model_fields.items():
            assert field.description, key


def test_the_page_lists_every_key() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    for key in (*SECTION_OF, *ALIASES, *REWRITTEN, *RETIRED, *REFUSED):
        assert f"`{key}`" in page


def test_the_schema_knows_every_key_and_no_other() -> None:
    schema = json.loads((ROOT / "docs/configuration.schema.json").read_text())
    assert set(schema["properties"]) == {*SECTION_OF, *ALIASES, FUSED_GELU, *RETIRED, *REFUSED}
    assert schema["additionalProperties"] is False
    assert all(entry["description"] for entry in schema["properties"].values())
    assert schema["properties"]["hidden_size"] == {
        "description": "Width of the residual stream.",
        "exclusiveMinimum": 0,
        "type": "integer",
    }


def test_references_within_the_schema_resolve() -> None:
    text = (ROOT / "docs/configuration.schema.json").read_text()
    definitions = json.loads(text)["$defs"]
    names = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert names == set(definitions)


def test_the_shipped_files_fit_the_schema() -> None:
    properties = json.loads((ROOT / "docs/configuration.schema.json").read_text())["properties"]
    for path in sorted((ROOT / "configs").glob("*.yml")):
        for entry in read_file(path):
            schema = properties[entry.key.split(".")[0]]
            if "enum" in schema:
                assert entry.value in schema["enum"]
