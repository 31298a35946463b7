"""``eod_mask_loss`` reaches the loss of training."""

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
