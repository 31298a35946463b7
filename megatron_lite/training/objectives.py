"""What is learned: from a model and a batch to a loss per token. A new one is a function and a line."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_lite.data.batches import Batch
from megatron_lite.model.loss import token_loss

Forward = Callable[[torch.Tensor], torch.Tensor]
"""tokens [b, s] → logits [b, s, vocabulary]."""

Objective = Callable[[Forward, Batch], torch.Tensor]
"""(model, batch) → loss of every token [b, s], fp32, nats."""


def causal_lm(forward: Forward, batch: Batch) -> torch.Tensor:
    """Cross entropy of each next token, given those before it."""
    return token_loss(forward(batch.tokens), batch.labels)


OBJECTIVES: dict[str, Objective] = {"causal_lm": causal_lm}
"""By name."""
