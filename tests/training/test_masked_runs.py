"""Masked language modelling finds what only the tokens after a hidden one tell."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from training_runs import run

from megatron_lite.data.indexed import IndexedWriter

VALUES = 16
"""Ids below are the tokens to find; as many ids after them say which."""


def write_answers_before_questions(folder: Path) -> Path:
    """Pairs of a token and the one that it follows from, which is drawn: what comes before tells nothing."""
    told = np.random.default_rng(0).integers(0, VALUES, 16384)
    found = (5 * told + 3) % VALUES
    with IndexedWriter(folder / "pairs", np.dtype(np.uint16)) as writer:
        for half in np.stack([found, told + VALUES], axis=1).reshape(2, -1):
            writer.add(half.tolist())
    return folder / "pairs"


def test_a_token_is_found_from_the_next_one(tmp_path: Path) -> None:
    """Who sees only what comes before guesses one of 16, except tokens that were left: about 2.5."""
    records = run(
        tmp_path,
        write_answers_before_questions(tmp_path),
        split="5, 5",
        mlm_training=True,
        mlm_mask_id=200,
        mlm_mask_prob=0.5,
        mlm_mask_ignore_ids=list(range(VALUES, 2 * VALUES)),
        attention_config=[[["global", "local"], 1]],
        sliding_window_width=2,
        init_method_std=0.1,
        train_iters=150,
        train_micro_batch_size_per_gpu=8,
        log_interval=50,
        optimizer={"type": "Adam", "params": {"lr": 5e-3}},
    )
    valid = records[-1]
    assert valid["valid/loss"] < 0.05
    assert valid["valid/perplexity"] == pytest.approx(math.exp(valid["valid/loss"]))
    assert "valid/bits_per_byte" not in valid, "most of the text is given"
