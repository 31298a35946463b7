"""Draw the loss curves of a run: ``plot_metrics.py runs/demo/metrics.jsonl loss.png``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.metrics.plot import plot_losses
from megatron_lite.utils.errors import command_line


@command_line
def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, help="the run's metrics.jsonl")
    parser.add_argument("picture", type=Path, help="where to write it; .png, .svg and .pdf choose the format")
    parser.add_argument("--title", default="", help="written above the curves")
    arguments = parser.parse_args()
    plot_losses(arguments.metrics, arguments.picture, arguments.title)
    print(f"wrote {arguments.picture}")


if __name__ == "__main__":
    sys.exit(main())
