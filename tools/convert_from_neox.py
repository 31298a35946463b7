"""GPT-NeoX's checkpoint as one of ours: ``convert_from_neox.py their/checkpoints runs/mine``.

Then ``deepy.py train.py OUT/model.yml my-data.yml`` goes on with its weights, under any layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.foreign import import_neox
from megatron_lite.hf.assemble import MODEL_FILE
from megatron_lite.utils.errors import command_line
from megatron_lite.utils.log import setup_logging


@command_line
def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint of GPT-NeoX, or the folder of checkpoints")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument(
        "--config", type=Path, nargs="+", action="extend", default=[], metavar="YAML",
        help="the run's files (default: those that GPT-NeoX saved in the checkpoint)",
    )  # fmt: skip
    parser.add_argument("--iteration", type=int, metavar="N", help="which checkpoint (default: the latest)")
    parser.add_argument(
        "--grouped-queries", choices=("old", "new"),
        help="rows of grouped queries as before or since November 2024 (default: old where the MLP's tensors "
        "have the names before August 2024)",
    )  # fmt: skip
    arguments = parser.parse_args()
    setup_logging()
    grouping = arguments.grouped_queries
    import_neox(
        arguments.folder, arguments.out, arguments.config, arguments.iteration, grouping and grouping == "old"
    )
    print(f"wrote {arguments.out}; train with: deepy.py train.py {arguments.out / MODEL_FILE}")


if __name__ == "__main__":
    sys.exit(main())
