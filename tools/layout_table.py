"""Write the table of memory by layout into docs/choosing-a-layout.md, as the planner computes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_lite.planner.examples import table
from megatron_lite.utils.errors import UserError, command_line
from megatron_lite.utils.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "choosing-a-layout.md"
BEGIN, END = "<!-- written by tools/layout_table.py -->\n", "<!-- end -->"


@command_line
def main() -> None:
    """Write the table, or with --check only say whether it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    text = before + BEGIN + table(ROOT / "configs") + "\n" + END + rest.split(END, 1)[1]
    if text == page:
        return
    if arguments.check:
        raise UserError(f"{PAGE} is out of date: run python tools/layout_table.py")
    write_text(PAGE, text)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    raise SystemExit(main())
