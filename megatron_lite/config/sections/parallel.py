"""Keys of the layout: who computes what."""

from __future__ import annotations

from megatron_lite.config.fields import NonNegative, Positive, Section, derived


class ParallelSection(Section):
    """How the ranks share the work."""

    world_size: Positive = derived("the number of ranks started")
    """Number of ranks of the run, a multiple of `model_parallel_size` x `pipe_parallel_size`; what remains is
    the data-parallel degree."""
    model_parallel_size: Positive = 1
    """Tensor-parallel degree: every layer's matrices are divided over so many ranks, neighbours in one
    machine."""
    pipe_parallel_size: NonNegative = 1
    """Pipeline stages; 0 and 1 both mean none."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that share one global batch."""
        return self.world_size // (self.model_parallel_size * max(self.pipe_parallel_size, 1))
