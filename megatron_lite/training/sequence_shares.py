"""What one of the ranks that share each sequence gets of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_lite.config import Config
from megatron_lite.data.batches import Batch
from megatron_lite.model.places import Places, places_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sequence import ContextParallel


@dataclass(frozen=True)
class SequenceShares:
    """Cuts micro-batches of whole sequences.

    Attributes:
        context: the ranks that share each sequence.
        reset_positions: whether positions count from the beginning of each document.
        device: where the model computes.
    """

    context: ContextParallel
    reset_positions: bool
    device: torch.device

    @classmethod
    def of_run(cls, config: Config, context: ParallelContext) -> SequenceShares:
        """As the keys say."""
        divided = ContextParallel(context.context, config.context_by_ring)
        return cls(divided, config.data.reset_position_ids, context.device)

    def share(self, batch: Batch) -> Batch:
        """This rank's tokens of ``batch``, with their labels. ``starts`` stay those of whole sequences."""
        cut, mask = self.context.share, batch.loss_mask
        return replace(
            batch,
            tokens=cut(batch.tokens),
            labels=cut(batch.labels),
            loss_mask=None if mask is None else cut(mask),
        )

    def places(self, share: Batch) -> Places | None:
        """Where the tokens of a :meth:`share` stand, for the model."""
        length = share.tokens.shape[1] * self.context.size
        return places_of(share.starts, length, self.device, self.context, self.reset_positions)
