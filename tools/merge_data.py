"""Merge token files: ``merge_data.py --input FOLDER --output-prefix data/all``.

Every ``.bin/.idx`` pair of the folder in the order of names, or those given with ``--prefixes`` in that
order, becomes one pair with a side file; documents keep their boundaries. Takes Megatron's and GPT-NeoX's
flags.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.merging import merge, prefixes_in
from megatron_lite.utils.errors import command_line


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", type=Path, metavar="FOLDER", help="folder whose pairs are merged")
    inputs.add_argument(
        "--prefixes", type=Path, nargs="+", metavar="PREFIX", help="pairs without their endings, in order"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="the pair to write, without ending")
    return parser.parse_args()


@command_line
def main() -> None:
    """Merge."""
    arguments = parse_arguments()
    start = time.monotonic()
    prefixes = arguments.prefixes or prefixes_in(arguments.input)
    output = merge(prefixes, arguments.output_prefix, say=lambda line: print(line, file=sys.stderr))
    merged = IndexedDataset(output)
    print(
        f"{output}: {merged.document_count:,} documents, {len(merged.tokens):,} tokens ({merged.dtype.name}) "
        f"from {len(prefixes)} files, {merged.tokens.nbytes / 1e6 / (time.monotonic() - start):,.0f} MB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
