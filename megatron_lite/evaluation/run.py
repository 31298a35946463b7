"""An evaluation from a checkpoint to its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_lite.checkpoint import find_checkpoint
from megatron_lite.evaluation.scoring import score
from megatron_lite.evaluation.tasks import Choice, run_tasks
from megatron_lite.evaluation.text import TextFigures, read_windows, text_figures
from megatron_lite.evaluation.writing import Manner, Opening, write
from megatron_lite.generation import TextModel
from megatron_lite.generation.load import load_shared
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.team import Job, Team, arrange_replicas
from megatron_lite.utils.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BATCH_TOKENS = 8192
"""Tokens of a batch at most, padding included."""


@dataclass(frozen=True)
class Replicas:
    """A checkpoint's model on all ranks: within ``team.led()`` rank 0 asks it.

    Attributes:
        checkpoint: which it is.
        model: this rank's part of it.
        team: the ranks.
        batch_tokens: tokens of a batch at most.
    """

    checkpoint: Path
    model: TextModel
    team: Team
    batch_tokens: int = BATCH_TOKENS

    def tasks(self, manager: TaskManager, choice: Choice) -> dict[str, Any]:
        """lm-eval's results, and under ``checkpoint``, ``limit``, ``lm_eval_version`` what they are of."""
        import lm_eval

        from megatron_lite.evaluation.harness import HarnessModel

        results = run_tasks(HarnessModel(self.model, self.team, self.batch_tokens), manager, choice)
        version = lm_eval.__version__
        return {
            "checkpoint": str(self.checkpoint),
            "limit": choice.limit,
            "lm_eval_version": version,
        } | results

    def text(self, inputs: Sequence[str], key: str = "text") -> TextFigures:
        """Loss, perplexity and bits per byte of files."""
        return text_figures(self.model, self.team, inputs, key, self.batch_tokens)


def open_replicas(
    context: ParallelContext,
    checkpoint: Path,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    tensor_ranks: int = 1,
    batch_tokens: int = BATCH_TOKENS,
) -> Replicas:
    """Load ``checkpoint`` (or the one of ``step`` in that folder) on all ranks; every rank calls this.

    ``tensor_ranks`` neighbours share a model, each with its part of the layers; the others are replicas.

    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: the ranks do not fit the model, or it does not predict what follows.
    """
    context = arrange_replicas(context, tensor_ranks)
    path = find_checkpoint(checkpoint, step)
    model = load_shared(context, path, dtype)
    if not model.config.model.causal:
        raise ConfigError(
            f"{path} was trained to find hidden tokens (mlm_training), from both sides: it gives no "
            "probabilities of texts"
        )

    def continued(piece: tuple[Sequence[Opening], Manner]) -> list[str]:
        return write(model, *piece)

    jobs: dict[str, Job] = {
        "score": partial(score, model.gpt),
        "write": continued,
        "read": partial(read_windows, model),
    }
    return Replicas(path, model, Team(context, jobs), batch_tokens)
