"""``eod_mask_loss`` and ``reset_attention_mask`` reach the loss of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_runs import KEYS, losses, run, write_corpus

from megatron_lite.config import config_from_keys
from megatron_lite.data.datasets import open_datasets
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory


@pytest.mark.parametrize("masked", [False, True])
def test_first_loss_is_the_mean_over_the_counted_tokens(masked: bool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    keys = {"eod_mask_loss": masked, "train_iters": 1, "train_batch_size": 64}
    config = config_from_keys({**KEYS, **keys, "data_path": str(corpus)})
    dataset = open_datasets(config).train
    windows = torch.from_numpy(np.stack([dataset[i] for i in range(config.batch.train_batch_size)]))
    tokens, labels = windows[:, :-1], windows[:, 1:]
    counted = tokens != 256 if masked else torch.ones_like(tokens, dtype=torch.bool)
    assert (tokens == 256).any()
    model = build_gpt(config, ParameterFactory(config.training.seed))
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens)[counted], labels[counted]).item()

    (measured,) = losses(run(tmp_path / "run", corpus, **keys))

    assert measured == pytest.approx(expected, rel=1e-5)


def test_first_loss_is_that_of_documents_apart(tmp_path: Path) -> None:
    """By two context ranks, too, whose validation loss is that of one."""
    corpus = write_corpus(tmp_path)
    keys = {"train_iters": 1, "train_batch_size": 16, "eval_iters": 1, "pos_emb": "learned"}
    config = config_from_keys({**KEYS, **keys, "data_path": str(corpus)})
    dataset = open_datasets(config).train
    windows = torch.from_numpy(np.stack([dataset[i] for i in range(config.batch.train_batch_size)]))
    model = build_gpt(config, ParameterFactory(config.training.seed))
    losses_apart = []
    with torch.no_grad():
        for window in windows:
            tokens, labels = window[:-1], window[1:]
            ends = [*((tokens == 256).nonzero().flatten() + 1).tolist(), len(tokens)]
            first = 0
            for last in ends:
                if last > first:
                    logits = model(tokens[None, first:last])
                    losses_apart.append(F.cross_entropy(logits[0], labels[first:last], reduction="none"))
                first = last
    assert len(losses_apart) > len(windows)

    keys |= {"reset_attention_mask": True, "reset_position_ids": True}
    one = run(tmp_path / "one", corpus, **keys)
    two = run(tmp_path / "two", corpus, 2, **keys, context_parallel_size=2)

    assert losses(one)[0] == pytest.approx(torch.cat(losses_apart).mean().item(), rel=1e-5)
    figures = ("train/loss", "valid/loss", "valid/bits_per_byte")
    for first_record, second in zip(one, two, strict=True):
        for figure in figures:
            if figure in first_record:
                assert second[figure] == pytest.approx(first_record[figure], rel=1e-5)
