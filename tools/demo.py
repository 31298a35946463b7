"""The tour that ``make demo`` gives: train a small GPT on real text, read what it writes, export it.

Each step is a command that you can type yourself; it is printed before it runs. Files go to ``runs/demo``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from megatron_lite.utils.errors import UserError, command_line

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def __init__(self"


def say_and_run(*words: str) -> None:
    """Print a command, run it, and stop the tour if it fails."""
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        raise UserError(f"the command above failed with exit status {status}; nothing after it was run")


def validation_losses(metrics: Path) -> list[float]:
    """Validation losses of the run in the order they were measured."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record["valid/loss"] for record in records if "valid/loss" in record]


def demo(run: Path, settings: list[str]) -> None:
    """Train, plot, sample, export and verify; ``settings`` are handed to the training command."""
    hf = run / "hf"
    if run.exists():
        raise UserError(f"{run} exists already; move it away or give another --run-dir to see the demo again")
    start = time.monotonic()
    overrides = [f"run_dir={run}", *settings]
    say_and_run("deepy.py", "train.py", "configs/demo.yml", "--set", *overrides)
    say_and_run("tools/plot_metrics.py", str(run / "metrics.jsonl"), str(run / "loss.png"))
    sampling = ["--max-new-tokens", "96", "--temperature", "0.7", "--top-p", "0.9", "--seed", "1"]
    say_and_run("tools/generate.py", str(run / "checkpoints"), "--prompt", PROMPT, *sampling)
    say_and_run("tools/convert_to_hf.py", str(run / "checkpoints"), str(hf), "--verify")
    losses = validation_losses(run / "metrics.jsonl")
    minutes = (time.monotonic() - start) / 60
    print(
        f"\nDone in {minutes:.1f} minutes. "
        f"Validation loss {losses[0]:.3f} before training, {losses[-1]:.3f} after."
        f"\nThe loss curve is {run / 'loss.png'}; "
        f'transformers loads the model with AutoModelForCausalLM.from_pretrained("{hf}").'
    )


@command_line
def main() -> None:
    """Parse the command line and give the tour."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="handed to the training run"
    )
    arguments = parser.parse_args()
    demo(arguments.run_dir, arguments.set)


if __name__ == "__main__":
    sys.exit(main())
