"""Write docs/configuration.md and docs/configuration.schema.json from the configuration's own definitions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.config.reference import json_schema, markdown
from megatron_lite.utils.errors import UserError, command_line
from megatron_lite.utils.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"


@command_line
def main() -> None:
    """Write both files, or with --check only say which of them is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    arguments = parser.parse_args()
    for name, text in (("configuration.md", markdown()), ("configuration.schema.json", json_schema())):
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if arguments.check:
            raise UserError(f"{path} is out of date: run python tools/config_reference.py")
        write_text(path, text)
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
