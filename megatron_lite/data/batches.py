"""Micro-batches: samples side by side on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_lite.data.windows import Dataset


@dataclass(frozen=True)
class Batch:
    """What one forward pass eats.

    Attributes:
        tokens: int64 [batch, seq].
        labels: int64 [batch, seq], the token that follows each of ``tokens``.
        loss_mask: float32 [batch, seq], the weight of each label's loss; None when every label counts.
        starts: int64 [batch, seq] on the CPU, for each token the place in its row at which its document
            begins, before which it must not see; None: every row is one document.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor | None = None
    starts: torch.Tensor | None = None


Fetch = Callable[[Dataset, int, int], Batch]
"""(data set, first sample, count) → micro-batch: :func:`micro_batch` with the run's device and mask."""


def micro_batch(
    dataset: Dataset,
    first_sample: int,
    count: int,
    device: torch.device,
    masked_token: int | None = None,
    document_end: int | None = None,
) -> Batch:
    """Samples ``first_sample`` … ``first_sample + count - 1`` of ``dataset`` on ``device``.

    What follows a ``masked_token`` does not count in the loss (GPT-NeoX's ``eod_mask_loss``, with the
    end-of-document id: the first token of a document cannot be foreseen). Behind a ``document_end`` another
    document begins (Megatron's ``reset_attention_mask``). Towards a GPU the copy starts from
    pinned memory and does not wait for itself.
    """
    samples = np.stack([dataset[first_sample + offset] for offset in range(count)])
    starts = None if document_end is None else document_starts(samples[:, :-1], document_end)
    windows = torch.from_numpy(samples)
    if device.type == "cuda":
        windows = windows.pin_memory()
    windows = windows.to(device, non_blocking=True)
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    loss_mask = None if masked_token is None else (tokens != masked_token).float()
    return Batch(tokens, labels, loss_mask, starts)


def unread(_dataset: Dataset, _first_sample: int, count: int, length: int) -> Batch:
    """A micro-batch of ``count`` samples of ``length`` without storage, for whom only the shape matters.

    That is a stage of a pipeline which is neither the first, which needs tokens, nor the last, which needs
    labels.
    """
    shape = torch.empty(count, length, dtype=torch.int64, device="meta")
    return Batch(shape, shape)


def without_rows(batch: Batch, kept: int) -> Batch:
    """``batch`` of the same shape, of which only the first ``kept`` rows count in the loss."""
    weights = (
        torch.ones_like(batch.labels, dtype=torch.float32) if batch.loss_mask is None else batch.loss_mask
    )
    counted = torch.arange(len(weights), device=weights.device)[:, None] < kept
    return replace(batch, loss_mask=weights * counted)


def document_starts(tokens: np.ndarray, document_end: int) -> torch.Tensor:
    """:attr:`Batch.starts` of ``tokens [batch, seq]``; a row begins within a document, or with one."""
    begins = np.zeros_like(tokens)
    begins[:, 1:] = np.where(tokens[:, :-1] == document_end, np.arange(1, tokens.shape[1]), 0)
    return torch.from_numpy(np.maximum.accumulate(begins, axis=1))
