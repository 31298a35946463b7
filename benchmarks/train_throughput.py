"""Tokens per second of ``train.py`` beside a bare PyTorch loop, and the time from command to first step.

The same 20M-parameter GPT, the same initial weights, the same batches; whole runs in turn (ours, bare, ours,
bare …), so that a machine whose speed drifts treats both alike. The figure of a run is its median step, the
first ones left out; the figure of the benchmark is the median of the ratios of the pairs. Losses are compared
too: a trainer that computes something else is no peer.

    python benchmarks/train_throughput.py [--pairs 5] [--steps 30] [--precision fp32 bf16]

Appends nothing anywhere: copy the table that it prints to ``benchmarks/README.md`` with the machine's name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 5
KEYS = {
    "num_layers": 8,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "seq_length": 512,
    "max_position_embeddings": 512,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
    "lr_decay_style": "constant",
    "warmup": 0.0,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
    "log_interval": 1,
    "eval_interval": 1_000_000,
    "eval_iters": 0,
    "seed": 1234,
}


@dataclass(frozen=True)
class Run:
    """One run: its median seconds per step, its losses, its seconds from command to first step."""

    step_seconds: float
    losses: list[float]
    start_up: float


def tokens_per_step() -> int:
    return int(KEYS["train_micro_batch_size_per_gpu"]) * int(KEYS["seq_length"])  # type: ignore[call-overload]


def run_ours(config: Path, precision: str, steps: int, run_dir: Path) -> Run:
    words = ["deepy.py", "train.py", str(config), "--set", f"run_dir={run_dir}", f"train_iters={steps}"]
    began = time.time()
    subprocess.run(
        [sys.executable, *words, f"precision={precision}"], cwd=ROOT, check=True, capture_output=True
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    seconds = statistics.median(line["speed/seconds_per_step"] for line in trained[WARMUP:])
    return Run(seconds, [line["train/loss"] for line in trained], trained[0]["time"] - began)


def run_bare(resolved: Path, precision: str, steps: int) -> Run:
    words = ["benchmarks/bare_loop.py", str(resolved), "--steps", str(steps)]
    words += ["--autocast"] if precision == "bf16" else []
    output = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads(output.stdout.splitlines()[-1])
    return Run(statistics.median(figures["seconds"][WARMUP:]), figures["losses"], 0.0)


def compare(precision: str, pairs: int, steps: int) -> None:
    ratios, ours_rates, bare_rates, start_ups, gap = [], [], [], [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "bench.yml"
        config.write_text(yaml.safe_dump(KEYS))
        for pair in range(pairs + 1):  # the first pair warms caches (tokens, byte code) and is not counted
            run_dir = Path(scratch) / f"run{pair}"
            ours = run_ours(config, precision, steps, run_dir)
            bare = run_bare(run_dir / "config.yml", precision, steps)
            if pair == 0:
                continue
            ratios.append(bare.step_seconds / ours.step_seconds)
            ours_rates.append(tokens_per_step() / ours.step_seconds)
            bare_rates.append(tokens_per_step() / bare.step_seconds)
            start_ups.append(ours.start_up)
            gap = max(gap, *(abs(a - b) / b for a, b in zip(ours.losses, bare.losses, strict=True)))
    print(
        f"{precision}: ours {statistics.median(ours_rates):.0f} tokens/s, bare loop "
        f"{statistics.median(bare_rates):.0f} tokens/s, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f}..{max(ratios):.3f}, {pairs} pairs), largest relative loss difference {gap:.1e}, "
        f"command to first step {statistics.median(start_ups):.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    for precision in arguments.precision:
        compare(precision, arguments.pairs, arguments.steps)


if __name__ == "__main__":
    main()
