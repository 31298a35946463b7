"""Show what is inside a checkpoint and, with --verify, whether it is sound.

Exit status: 0; 1 when --verify found something wrong, which it tells in a sentence each; 2 when there is no
checkpoint that can be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_lite.checkpoint import find_checkpoint
from megatron_lite.checkpoint.files import ElementReader
from megatron_lite.checkpoint.summary import as_text, describe
from megatron_lite.checkpoint.verification import find_problems
from megatron_lite.utils.errors import command_line


@command_line
def main() -> int:
    """Parse the command line, show, verify."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of checkpoints")
    parser.add_argument(
        "--iteration", type=int, help="step of the checkpoint in the folder (default: the latest)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything: sizes and checksums of all files, every parameter whole, no NaN or infinity",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args()
    reader = ElementReader.of(find_checkpoint(arguments.checkpoint, arguments.iteration))
    facts = describe(reader.checkpoint, reader.index)
    if not arguments.json:
        print(as_text(facts))
    problems = list(find_problems(reader)) if arguments.verify else []
    if arguments.json:
        print(json.dumps({**facts, "problems": problems} if arguments.verify else facts, indent=2))
    elif arguments.verify and not problems:
        print("\nsound: every file as it was written, every parameter whole, no NaN or infinity")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
