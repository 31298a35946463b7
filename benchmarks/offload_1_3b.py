"""A model of 1.3B parameters takes two optimizer steps with parameters and optimizer on NVMe: its memory.

Runs configs/1-3B.yml with configs/nvme.yml in bf16 on one CPU rank, through ``deepy.py`` like any run, and
prints the launcher's estimate beside the peak of what all processes of the run had in memory.

    python benchmarks/offload_1_3b.py [--folder DIR] [--steps 2] [--set key=value ...]

``--folder`` is where swap files (25 GB) and the checkpoint at the end (17 GB) are; both are removed after.
The vocabulary is padded to GPT-2's 50,304, so that the model has its 1.41B parameters (embedding and head
apart) whatever the tokenizer. ``--set`` changes keys, for example ``num_layers=2`` to try it quickly.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from megatron_lite.config import load_config
from megatron_lite.planner import count_parameters, estimate_memory

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "configs" / name for name in ("1-3B.yml", "bf16.yml", "nvme.yml")]
KEYS = {
    "seq_length": 512,
    "train_micro_batch_size_per_gpu": 1,
    "make_vocab_size_divisible_by": 50304,
    "num_gpus": 1,
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 0,
    "wall_clock_breakdown": "false",
}
SECONDS = 0.1
"""Between two looks at the processes."""


def memory_of(root: int) -> Counter[str]:
    """Bytes that ``root`` and its descendants have in memory, by kind: ``Anon``, ``File``, ``Shmem``."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if "RssAnon" in fields:
            number = int(status.parent.name)
            parents[number] = int(fields["PPid"])
            kinds = ("Anon", "File", "Shmem")
            sizes[number] = Counter({kind: int(fields[f"Rss{kind}"].split()[0]) << 10 for kind in kinds})
    total: Counter[str] = Counter()
    for number, size in sizes.items():
        ancestor = number
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root:
            total += size
    return total


class Watch(threading.Thread):
    """Looks at the processes of a run until it has ended, and keeps the peaks."""

    def __init__(self, process: subprocess.Popen[bytes], trace: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.trace = process, trace
        self.peak = self.peak_with_files = 0

    def run(self) -> None:
        start = time.monotonic()
        with open(self.trace, "w") as trace:
            while self.process.poll() is None:
                now = memory_of(self.process.pid)
                own = now["Anon"] + now["Shmem"]
                self.peak = max(self.peak, own)
                self.peak_with_files = max(self.peak_with_files, own + now["File"])
                print(f"{time.monotonic() - start:.1f} {own / 1e9:.2f} {now['File'] / 1e9:.2f}", file=trace)
                time.sleep(SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument(
        "--trace", type=Path, default=Path("/dev/null"), help="memory by time: s, GB, GB of files"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="offload-", dir=arguments.folder) as scratch:
        return run(Path(scratch), arguments)


def run(scratch: Path, arguments: argparse.Namespace) -> int:
    """The run, within ``scratch``; prints its output and the figures."""
    keys = {**KEYS, "train_iters": arguments.steps, "run_dir": str(scratch / "run")}
    for block in ("offload_optimizer", "offload_param"):
        keys[f"zero_optimization.{block}.nvme_path"] = str(scratch)
    words = [f"{key}={value}" for key, value in keys.items()] + arguments.set
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, ROOT / "deepy.py", ROOT / "train.py", *FILES, "--set", *words], cwd=ROOT
    )
    watch = Watch(process, arguments.trace)
    watch.start()
    status = process.wait()
    watch.join()
    if status:
        return status
    report(scratch / "run", watch, time.monotonic() - started)
    return 0


def report(run_dir: Path, watch: Watch, seconds: float) -> None:
    """Print the peaks beside the estimate, and what the steps did."""
    config = load_config([run_dir / "config.yml"])
    estimate = estimate_memory(config)
    estimated = estimate.device_total + estimate.host_total
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    print(f"\n{count_parameters(config):,} parameters, {len(losses)} steps, losses {losses}, {seconds:.0f} s")
    print(f"memory   {watch.peak / 1e9:.2f} GB at the peak, of all processes")
    print(f"         {estimated / 1e9:.2f} GB estimated, {estimated / watch.peak - 1:+.0%}")
    print(f"         {watch.peak_with_files / 1e9:.2f} GB with pages of files, which the kernel takes back")
    print(f"swap     {estimate.disk_total / 1e9:.2f} GB estimated")


if __name__ == "__main__":
    raise SystemExit(main())
