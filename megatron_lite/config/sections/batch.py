"""Keys of the batch."""

from __future__ import annotations

from megatron_lite.config.fields import Positive, Section, derived


class BatchSection(Section):
    """How many sequences a step sees.

    `train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel ranks`:
    give any one or two of them."""

    train_batch_size: Positive = derived("micro batch x accumulation x data-parallel ranks")
    """Sequences in one optimizer step, over all ranks."""
    train_micro_batch_size_per_gpu: Positive = derived("from the other two, or 1")
    """Sequences in one forward pass of one rank."""
    gradient_accumulation_steps: Positive = derived("from the other two, or 1")
    """Micro batches in one optimizer step of one rank."""
    rampup_batch_size: tuple[Positive, Positive, Positive] | None = None
    """[start, increment, tokens]: begin with `start` sequences a step and grow by `increment` to
    `train_batch_size` over that many tokens."""
