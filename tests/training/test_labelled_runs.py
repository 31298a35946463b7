"""Labels, whole documents and hidden tokens reach the loss of training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_runs import KEYS, labelled_corpus, losses, run, write_corpus

from megatron_lite.config import config_from_keys
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.samples import UNCOUNTED, as_sample
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory


def losses_by_hand(keys: dict[str, Any], samples: range) -> tuple[float, float]:
    """Mean loss per counted token of the run's first samples, and of its validation samples, with the weights
    that it begins with, from each document by itself."""
    config = config_from_keys(keys)
    model = build_gpt(config, ParameterFactory(config.training.seed))
    splits = open_datasets(config)
    means = []
    for dataset in (splits.train, splits.valid):
        assert dataset is not None
        total = count = 0.0
        for sample in map(as_sample, (dataset[number] for number in samples)):
            edges = [0] if sample.starts is None else np.unique(sample.starts).tolist()
            for first, last in zip(edges, [*edges[1:], len(sample.tokens)], strict=True):
                labels = torch.from_numpy(sample.labels[first:last])
                with torch.no_grad():
                    logits = model(torch.from_numpy(sample.tokens[None, first:last]))[0]
                total += F.cross_entropy(logits, labels, ignore_index=UNCOUNTED, reduction="sum").item()
                count += int((labels >= 0).sum())
        means.append(total / count)
        assert 0 < count < len(samples) * config.model.seq_length / 2, "only some tokens count"
    return means[0], means[1]


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("labels", 2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "pos_emb": "learned"}),
        ("masked", 2, {"zero_optimization": {"stage": 1}}),
    ],
    ids=["labels-pipe2", "masked-data2"],
)
def test_first_losses(kind: str, ranks: int, layout: dict[str, Any], tmp_path: Path) -> None:
    keys = {"train_iters": 1, "eval_at_start": True, "eval_iters": 1, "lr_decay_style": "constant", **layout}
    if kind == "labels":
        keys |= labelled_corpus(tmp_path)
    else:
        keys |= {"data_path": str(write_corpus(tmp_path)), "split": "5, 5"}
        keys |= {"mlm_training": True, "mlm_mask_id": 256, "mlm_cls_token_id": 255}
    train, valid = losses_by_hand({**KEYS, **keys}, range(8))

    records = run(tmp_path / "run", **{"corpus": tmp_path, **keys}, world_size=ranks)

    assert losses(records)[0] == pytest.approx(train, rel=1e-5)
    assert records[0]["valid/loss"] == pytest.approx(valid, rel=1e-5)
