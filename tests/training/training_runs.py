"""Small real runs for the tests of training: a corpus of bytes, and ``train`` on one or several ranks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ranks import run_ranks

from megatron_lite.config import config_from_keys
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.samples import UNCOUNTED

KEYS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "pos_emb": "rotary",
    "vocab_size": 257,
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 20,
    "log_interval": 1,
    "eval_interval": 0,
    "eval_iters": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3}},
    "lr_decay_style": "cosine",
    "tokenizer_type": "ByteTokenizer",
}


def write_corpus(folder: Path) -> Path:
    """Python source (argparse's) as one document a paragraph; the prefix of the token files."""
    prefix = folder / "corpus"
    text = Path(argparse.__file__).read_bytes()
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for paragraph in text.split(b"\n\n"):
            writer.add([*paragraph, 256])
    return prefix


def labelled_corpus(folder: Path) -> dict[str, Any]:
    """The corpus with labels for the second half of each document; the keys that name it."""
    prefix = write_corpus(folder)
    corpus = IndexedDataset(prefix)
    with IndexedWriter(folder / "labels", np.dtype("<i4")) as writer:
        for number in range(corpus.document_count):
            tokens = corpus.document(number).astype(int)
            half = len(tokens) // 2
            writer.add([*[UNCOUNTED] * half, *tokens[half:].tolist()])
    return {
        "data_path": None,
        "train_data_paths": [str(prefix)],
        "train_label_data_paths": [str(folder / "labels")],
        "valid_data_paths": [str(prefix)],
        "valid_label_data_paths": [str(folder / "labels")],
        "pack_impl": "pack_until_overflow",
        "seq_length": 128,
    }


def train_rank(keys: dict[str, Any], world_size: int) -> int:
    """One rank of a run (in a process of its own)."""
    from megatron_lite.parallel.context import context_from_environment
    from megatron_lite.training.run import train

    return train(config_from_keys(keys, world_size=world_size), context_from_environment())


def run(folder: Path, corpus: Path, world_size: int = 1, **keys: Any) -> list[dict[str, Any]]:
    """Train in ``folder`` with ``KEYS`` and ``keys``; the records of ``metrics.jsonl``."""
    keys = {**KEYS, "data_path": str(corpus), "run_dir": str(folder), **keys}
    assert run_ranks(train_rank, world_size, keys, world_size) == [0] * world_size
    return records(folder)


def records(folder: Path) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` holds."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder_records: list[dict[str, Any]]) -> list[float]:
    """The training losses, in order."""
    return [record["train/loss"] for record in folder_records if "train/loss" in record]
