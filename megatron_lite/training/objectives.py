"""What is learned: from a model and a batch to a loss per token. A new one is a function and a line."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_lite.data.batches import Batch
from megatron_lite.model.loss import token_loss
from megatron_lite.parallel.context import Axis

Forward = Callable[[Batch], torch.Tensor]
"""The tokens of a batch [b, s], of any documents and part of their sequences → logits [b, s, vocabulary], of
which each tensor rank has its range of the vocabulary."""

Objective = Callable[[Forward, Batch, Axis], torch.Tensor]
"""(model, batch, tensor axis) → loss of every token [b, s], fp32, nats; the same on every tensor rank."""


def causal_lm(forward: Forward, batch: Batch, tensor: Axis) -> torch.Tensor:
    """Cross entropy of each next token, given those before it."""
    return token_loss(forward(batch), batch.labels, tensor)


OBJECTIVES: dict[str, Objective] = {"causal_lm": causal_lm}
"""By name."""
