"""Reading token files: opening a large corpus, opening many of them blended, and feeding batches.

1. One corpus of 10M documents and 5B tokens (synthetic lengths, a sparse file), three epochs: seconds and
   memory, beyond the mapped files, until the first batch and a batch anywhere in the three epochs are there.
2. 64 such corpora (links to the same files), blended by weights: the same.
3. Tokens a second that one process feeds: windows of a file in the page cache, to batches, prepared in the
   background as in training.

    python benchmarks/data_reading.py
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.batches import Batch, micro_batch
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.indexed import bin_path, idx_path, write_index
from megatron_lite.data.prefetch import prepared_ahead

DTYPE = np.dtype("<u2")
BATCH = 8
EPOCHS = 3


def write_sparse_corpus(prefix: Path, documents: int) -> int:
    """A corpus of log-normal document lengths, 500 tokens on average, all tokens 0. Returns the tokens."""
    lengths = np.random.default_rng(1).lognormal(np.log(500) - 0.5, 1.0, documents).astype("<i4") + 1
    write_index(idx_path(prefix), DTYPE, [lengths])
    tokens = int(lengths.sum(dtype=np.int64))
    with open(bin_path(prefix), "wb") as file:
        file.truncate(tokens * DTYPE.itemsize)
    return tokens


def write_dense_corpus(prefix: Path, tokens: int) -> None:
    """A corpus of random tokens in documents of 1,000; its pages are in memory when it is written."""
    write_index(idx_path(prefix), DTYPE, [np.full(tokens // 1000, 1000, "<i4")])
    generator = np.random.default_rng(1)
    with open(bin_path(prefix), "wb") as file:
        for _ in range(tokens // 1_000_000):
            file.write(generator.integers(0, 50_000, 1_000_000, dtype=np.uint16).tobytes())


def link(prefix: Path, number: int) -> str:
    """Another name for a corpus."""
    other = prefix.with_name(f"{prefix.name}_{number}")
    for path in (bin_path, idx_path):
        if not path(other).exists():
            os.link(path(prefix), path(other))
    return str(other)


def config_of(paths: list[str], seq_length: int) -> Config:
    """A run that trains on ``paths``, with weights of all sizes."""
    weights = random.Random(1)
    return config_from_keys(
        {
            "num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "seq_length": seq_length,
            "vocab_size": 50257, "train_data_paths": paths,
            "train_data_weights": [weights.expovariate(1) + 1e-3 for _ in paths],
        }
    )  # fmt: skip


def own_memory() -> int:
    """Bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell RssAnon")


def measure_opening(paths: list[str]) -> None:
    """Print seconds and memory until the first and a random batch are there; in a process of its own."""
    config = config_of(paths, 2048)
    device = torch.device("cpu")
    torch.zeros(BATCH, 2049, dtype=torch.int64)
    memory, start = own_memory(), time.perf_counter()
    train = open_datasets(config).train
    micro_batch(train, 0, BATCH, device)
    first = time.perf_counter()
    sample = random.Random(2).randrange(EPOCHS * train.samples_per_epoch)
    micro_batch(train, sample, BATCH, device)
    end = time.perf_counter()
    print(
        f"{len(paths):3d} corpora, {train.tokens / 1e9:.1f}B tokens: {end - start:.3f} s (opening and first "
        f"batch {first - start:.3f} s), {(own_memory() - memory) / 1e6:.1f} MB"
    )


def measure_feeding(path: str, seq_length: int, seconds: float) -> None:
    """Print how many tokens a second come out of the training's way of reading."""
    train = open_datasets(config_of([path], seq_length)).train

    def prepare(step: int) -> list[Batch]:
        return [micro_batch(train, step * BATCH, BATCH, torch.device("cpu"))]

    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    with closing(prepared_ahead(prepare, range(10**9))) as feed:
        while time.perf_counter() - start < seconds:
            (batch,) = next(feed)
            tokens += batch.tokens.numel()
    used, elapsed = time.process_time() - cpu, time.perf_counter() - start
    print(
        f"feeding sequences of {seq_length}: {tokens / elapsed / 1e6:.1f} M tokens/s "
        f"({tokens / used / 1e6:.1f} M a CPU second)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--corpora", type=int, default=64)
    parser.add_argument("--feed-tokens", type=int, default=200_000_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of feeding, for each sequence length")
    parser.add_argument("--open", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        measure_opening(arguments.open)
        return
    with tempfile.TemporaryDirectory(prefix="reading-") as folder:
        large, dense = Path(folder, "large"), Path(folder, "dense")
        tokens = write_sparse_corpus(large, arguments.documents)
        print(f"{arguments.documents:,} documents, {tokens:,} tokens")
        for corpora in (1, arguments.corpora):
            paths = [link(large, number) for number in range(corpora)]
            subprocess.run([sys.executable, __file__, "--open", *paths], check=True)
        write_dense_corpus(dense, arguments.feed_tokens)
        torch.set_num_threads(1)
        for seq_length in (512, 2048):
            measure_feeding(str(dense), seq_length, arguments.seconds)


if __name__ == "__main__":
    main()
