"""Cut a checkpoint for another layout: ``reshard_checkpoint.py IN OUT --set model_parallel_size=2``.

Any layout loads any checkpoint as it is. This makes a large one quicker to load many times under the same
layout: each rank then reads its own files only, from end to end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.checkpoint import find_checkpoint
from megatron_lite.config.cli import config_paths
from megatron_lite.training.reshard import reshard
from megatron_lite.utils.errors import command_line


@command_line
def main() -> None:
    """Parse the command line, cut, say what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of checkpoints")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument(
        "--iteration", type=int, help="step of the checkpoint in the folder (default: the latest)"
    )
    parser.add_argument(
        "--config", metavar="CONF", nargs="+", default=[], help="YAML files of the run that will load it"
    )
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="keys of the new layout, e.g. --set model_parallel_size=2 world_size=4 (without world_size "
        "there are as many data-parallel ranks as before)",
    )  # fmt: skip
    arguments = parser.parse_args()
    source = find_checkpoint(arguments.checkpoint, arguments.iteration)
    written, config = reshard(source, arguments.out, config_paths(arguments.config), arguments.overrides)
    print(f"wrote {written} for {config.parallel.world_size} ranks")


if __name__ == "__main__":
    sys.exit(main())
