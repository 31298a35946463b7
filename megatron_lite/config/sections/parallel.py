"""Keys of the layout: who computes what."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from megatron_lite.config.fields import Bool, NonNegative, Positive, Section, Text, derived


def _partition_method(value: str) -> str:
    """One of the ways to divide layers into stages."""
    if value.startswith("type:"):
        try:
            re.compile(value.removeprefix("type:"))
        except re.error as error:
            raise ValueError(f"{value!r} holds no regular expression: {error}") from None
    elif value not in ("parameters", "uniform"):
        raise ValueError(f"is {value!r}; it can be parameters, uniform, or type: and a regular expression")
    return value


class ParallelSection(Section):
    """How the ranks share the work."""

    world_size: Positive = derived("the number of ranks started")
    """Number of ranks of the run, a multiple of `model_parallel_size` x `pipe_parallel_size` x
    `context_parallel_size`; what remains is the data-parallel degree."""
    model_parallel_size: Positive = 1
    """Tensor-parallel degree: every layer's matrices are divided over so many ranks, neighbours in one
    machine."""
    sequence_parallel: Bool = False
    """Between the matrices, keep a slice of the sequence on each tensor-parallel rank, so that norms, dropout
    and residuals are computed once, with the same traffic. Of no effect with `model_parallel_size: 1`."""
    pipe_parallel_size: NonNegative = 1
    """Pipeline stages; 0 and 1 both mean none."""
    pipe_partition_method: Annotated[Text, AfterValidator(_partition_method)] = "type:transformer|mlp"
    """How the layers are divided into stages: `type:` and a regular expression gives each stage as many of
    the layers whose class it names (`Embedding`, `Block`, `FinalNorm`, `Head`, or GPT-NeoX's names);
    `parameters` balances the number of parameters, `uniform` the number of layers of any kind."""

    context_parallel_size: Positive = 1
    """Context-parallel degree: each sequence is divided over so many ranks, for sequences that are too long
    for one."""
    context_parallel_kind: Literal["auto", "ulysses", "ring"] = "auto"
    """How attention sees whole sequences: `ulysses` exchanges tokens for heads, which the degree must divide;
    with `ring` keys and values go from rank to rank. `auto`: `ulysses` where it can."""
    expert_parallel_size: Positive = 1
    """Expert-parallel degree: the experts of a layer are divided over so many of the data-parallel (and
    context-parallel) ranks, which exchange the tokens that are routed to them."""

    @property
    def replica_size(self) -> int:
        """Ranks that share one copy of the model and of each sequence."""
        return self.model_parallel_size * max(self.pipe_parallel_size, 1) * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Ranks that share one global batch."""
        return self.world_size // self.replica_size

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model and see different tokens: ZeRO divides over them."""
        return self.data_parallel_size * self.context_parallel_size
