"""The engine of a pipeline: one optimizer step on a global batch, by DeepSpeed's pipeline engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_lite.config import Config
from megatron_lite.data.batches import Batch
from megatron_lite.model.moe import routers_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.training import deepspeed_defects as defects
from megatron_lite.training.bubble import Bubble
from megatron_lite.training.engine import Engine, StepResult, counted_tokens, engine_settings
from megatron_lite.training.experts import declared_experts
from megatron_lite.training.objectives import Objective
from megatron_lite.training.optimizers import build_optimizer, set_lr
from megatron_lite.training.sequence_shares import SequenceShares
from megatron_lite.training.stages import PipelinedGPT


class PipelineEngine(Engine):
    """A model in stages: micro-batches follow each other through them, one forward and one backward in turn.

    The schedule is 1F1B (PipeDream-Flush, Narayanan et al., arXiv 2104.04473). With p stages and m
    micro-batches a rank waits (p - 1) / (m + p - 1) of the time.

    Attributes:
        bubble: measures that, when ``wall_clock_breakdown`` or ``layout_account`` asks for it.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        build_model: Callable[[torch.dtype], PipelinedGPT],
        objective: Objective,
    ) -> None:
        """Build this rank's stage and wrap it; the arguments are those of :class:`Engine`."""
        self._objective = objective
        self._context = context
        self._shares = SequenceShares.of_run(config, context)
        settings = pipeline_settings(config)
        defects.import_muon(compiled=False)
        model = self._module = build_model(DTYPES[config.precision.precision])
        self._routers, self._has_experts = routers_of(model), config.model.moe_num_experts > 1
        with declared_experts(model, context, config.zero.stage):
            self._optimizer = build_optimizer(config.optimizer, model)
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings, dist_init_required=False
            )
        defects.reduce_only_across_ranks(self.deepspeed, context.replicas.size)
        defects.reduce_tied_gradients_wherever_they_are(self.deepspeed)
        defects.let_the_loss_scale_rest(self.deepspeed)
        defects.drop_offloaded_gradients_of_a_skipped_step(self.deepspeed)
        self.deepspeed.module.loss_fn = self._weighted_loss
        watched = config.logging.wall_clock_breakdown or config.logging.layout_account
        self.bubble = Bubble(self.deepspeed, context) if watched else None
        self._micro_batch_size = config.batch.train_micro_batch_size_per_gpu
        self._weight: torch.Tensor | float = 1.0
        self._shape: torch.Size | None = None

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """See :meth:`Engine.train_step`. All ranks of a pipeline hand in the same, and get the loss.

        DeepSpeed divides the gradient by the number of micro-batches; the weight makes up for it.
        """
        engine = self.deepspeed
        set_lr(self._optimizer, lr)
        count = len(micro_batches)
        if count != engine.micro_batches:
            engine.set_train_batch_size(count * self._micro_batch_size * self._context.replicas.size)
        shares = [self._shares.share(batch) for batch in micro_batches]
        self._weight = self._context.replicas.size * count / self._count_tokens(shares)
        self._weigh_balance(micro_batches)
        loss_scale = self.loss_scale
        self._expect(shares)
        if self.bubble:
            self.bubble.begin()
        engine.train_batch(_feed(shares))
        if self.bubble:
            self.bubble.end(count)
        self._copy_tied_weights()
        self._let_go()
        norm = engine.get_global_grad_norm()
        return StepResult(engine.dp_group_loss, norm, not engine.was_step_applied(), loss_scale)

    @torch.no_grad()
    def eval_loss(self, micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Engine.eval_loss`. Every rank of the pipeline gets what the last stage finds.

        Micro-batches follow each other as in training: with m of them a rank waits (p - 1) / (m + p - 1) of
        the time.
        """
        engine, count = self.deepspeed, len(micro_batches)
        self._weight = 1.0
        shares = [self._shares.share(batch) for batch in micro_batches]
        self._expect(shares)
        losses = engine.eval_batch(
            _feed(shares), reduce_output=None, bcast_loss=False, num_micro_batches=count
        )
        self._let_go()
        found = torch.zeros(2, dtype=torch.float64, device=self._context.device)
        if engine.is_last_stage():
            found[0] = torch.stack(losses).double().sum()
            found[1] = torch.stack([counted_tokens(share) for share in shares]).sum()
        last = engine.grid.stage_to_global(engine.num_stages - 1)
        dist.broadcast(found, last, group=self._context.pipe.group)
        return found[0], found[1]

    @torch.no_grad()
    def _copy_tied_weights(self) -> None:
        """Give the last stage the first one's tied weights.

        Both stages add up the same gradients of all replicas, in an order that depends on their place: with
        three addends or more the copies would drift apart, by a rounding in every step.
        """
        if self._context.replicas.size > 2:
            self._module._synchronize_tied_weights()

    def _weighted_loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the last stage differentiates."""
        return (
            self._sum(self._objective(lambda _batch: logits, batch, self._context.tensor), batch)
            * self._weight
        )

    def _expect(self, shares: Sequence[Batch]) -> None:
        """Tell this stage where the tokens of the coming micro-batches stand.

        And let the stages agree anew on what they send each other when the shape changes.
        """
        self._module.coming = [self._shares.places(share) for share in shares]
        if shares[0].tokens.shape != self._shape:
            self.deepspeed.reset_activation_shape()
            self._shape = shares[0].tokens.shape

    def _let_go(self) -> None:
        """Free the last micro-batches' activations and logits, which DeepSpeed keeps until the next step."""
        for buffers in self.deepspeed.pipe_buffers.values():
            buffers[:] = [None] * len(buffers)


def _feed(shares: Sequence[Batch]) -> Any:
    """What DeepSpeed loads: (input of the first stage, what the loss wants) of each micro-batch."""
    return iter([(share.tokens, share) for share in shares])


def pipeline_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's dictionary for ``config`` in stages.

    - ``overlap_comm`` is off: with it, stage 1 would never reduce the gradients of a pipeline.
    - DeepSpeed's timers are off: without its progress lines they divide by None. :class:`Bubble` measures.
    - Activations go whole from rank to rank, also between tensor-parallel ranks.
    """
    settings = engine_settings(config)
    settings["zero_optimization"]["overlap_comm"] = False
    settings["wall_clock_breakdown"] = False
    settings["pipeline"] = {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False}
    return settings
