"""A model that writes on several ranks: neighbours share its layers, and replicas divide the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_lite.config.sections.generation import GenerationSection
from megatron_lite.generation.load import TextModel, load_shared
from megatron_lite.generation.sampling import Sampling
from megatron_lite.generation.text import Sample, batches_of, stream, write_batch
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.team import Team, arrange_replicas


@dataclass(frozen=True)
class TextReplicas:
    """A model on all ranks: within ``team.led()`` rank 0 asks it.

    Attributes:
        model: this rank's part of it.
        team: the ranks.
    """

    model: TextModel
    team: Team

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        max_new_tokens: int,
        num_samples: int = 1,
        batch_size: int = 8,
    ) -> Iterator[Sample]:
        """As :func:`megatron_lite.generation.generate`, a batch on each replica at a time."""
        batches = batches_of(self.model, prompts, sampling, max_new_tokens, num_samples, batch_size)
        for first in range(0, len(batches), self.team.replicas):
            for samples in self.team.do("write", batches[first : first + self.team.replicas]):
                yield from samples

    def stream(self, prompt: str, sampling: Sampling, max_new_tokens: int) -> None:
        """The pieces of :func:`megatron_lite.generation.stream`, as each comes, to the ``show`` of rank 0."""
        self.team.do("stream", [(prompt, sampling, max_new_tokens)])


def print_piece(text: str) -> None:
    """Print ``text``, and what comes next behind it."""
    print(text, end="", flush=True)


def load_replicas(
    context: ParallelContext,
    checkpoint: Path,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    tensor_ranks: int = 1,
    keys: GenerationSection | None = None,
    show: Callable[[str], None] = print_piece,
) -> TextReplicas:
    """Load ``checkpoint`` (or the one of ``step`` in that folder) on all ranks; every rank calls this.

    ``tensor_ranks`` neighbours share a model, each with its part of the layers; the others are replicas.
    ``keys`` stand in the place of the run's own; ``show`` is given what is streamed.

    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: the ranks do not fit the model.
    """
    context = arrange_replicas(context, tensor_ranks)
    model = load_shared(context, checkpoint, dtype, step)
    if keys is not None:
        model = replace(model, config=replace(model.config, generation=keys))

    def streamed(piece: tuple[str, Sampling, int]) -> None:
        for text in stream(model, *piece):
            if context.is_first:
                show(text)

    return TextReplicas(model, Team(context, {"write": partial(write_batch, model), "stream": streamed}))
