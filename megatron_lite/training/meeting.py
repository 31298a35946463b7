"""How the ranks of a tool meet, which may be one only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron_lite.parallel.context import ParallelContext

PATIENCE_SECONDS = 24 * 3600.0
"""How long ranks wait for rank 0, which may have to load data, compute figures or ask a person in between."""


def meeting(context: ParallelContext) -> AbstractContextManager[None]:
    """Within: the ranks can talk. A single one has no need to, and starts seconds earlier."""
    if context.world_size == 1:
        return nullcontext()
    from megatron_lite.training.distributed import distributed  # which imports DeepSpeed

    return distributed(context, PATIENCE_SECONDS)
