"""The engine: one optimizer step on a global batch, by DeepSpeed's plain engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.config import Config
from megatron_lite.config.deepspeed import deepspeed_config
from megatron_lite.data.batches import Batch
from megatron_lite.model.moe import routers_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import DTYPES, spec_of
from megatron_lite.training import deepspeed_defects as defects
from megatron_lite.training.experts import Partitioned, declared_experts
from megatron_lite.training.mpu import TensorDataMpu
from megatron_lite.training.objectives import Objective
from megatron_lite.training.optimizers import build_optimizer, set_lr
from megatron_lite.training.sequence_shares import SequenceShares
from megatron_lite.training.zero import check_zero, zero_settings
from megatron_lite.utils.log import LOGGER


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: this rank's share of the mean loss per token of the global batch; their mean over the
            replicas (data and context ranks) is the global batch's loss. A scalar on the device: reading it
            waits for it.
        grad_norm: norm of the whole gradient before clipping; inf when the step was skipped.
        skipped: whether the update was left out because of a gradient that is not finite.
        loss_scale: fp16's loss scale of this step; 1 otherwise.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor | float
    skipped: bool
    loss_scale: float


class Engine:
    """A model under DeepSpeed's plain engine: ZeRO 0-3, offload, fp32, bf16, fp16, gradient accumulation.

    Attributes:
        deepspeed: DeepSpeed's engine, for checkpoints.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        build_model: Callable[[torch.dtype], nn.Module],
        objective: Objective,
    ) -> None:
        """Build the model (under ``zero.Init`` at stage 3, so that it is never whole anywhere) and wrap it.

        ``build_model`` makes the model with parameters of the dtype it is given, on the CPU, each with its
        ``spec``. ``torch.distributed`` must be running (:mod:`megatron_lite.training.distributed`).
        """
        check_zero(config, context.device)
        self._objective = objective
        self._context = context
        self._shares = SequenceShares.of_run(config, context)
        self._own_clipping = config.optimizer.gradient_clipping
        settings = engine_settings(config)
        stage = settings["zero_optimization"]["stage"]
        is_muon = config.optimizer.type == "muon"
        defects.import_muon(compiled=is_muon and context.device.type == "cuda")
        dtype = DTYPES[config.precision.precision]
        mpu = defects.hand_over(TensorDataMpu(context) if context.tensor.size > 1 else None)
        partition = mpu.get_data_parallel_group() if mpu else None
        with Partitioned(
            context,
            data_parallel_group=partition,
            config_dict_or_path=settings,
            mpu=mpu,
            enabled=stage == 3,
        ):
            model = build_model(dtype)
        with declared_experts(model, context, stage):
            self._optimizer = build_optimizer(config.optimizer, model)
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings, dist_init_required=False, mpu=mpu
            )
        defects.reduce_only_across_ranks(self.deepspeed, context.replicas.size)
        defects.let_the_loss_scale_rest(self.deepspeed)
        defects.drop_offloaded_gradients_of_a_skipped_step(self.deepspeed)
        defects.add_up_norms_of_experts(self.deepspeed)
        self._clips_itself = stage == 0
        if self._clips_itself:
            defects.leave_out_what_overflows(self.deepspeed.optimizer)
        self._routers, self._has_experts = routers_of(model), config.model.moe_num_experts > 1
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One update at rate ``lr`` from this data rank's micro-batches, whole sequences, of a global batch.

        The gradient is that of the mean loss per counted token of the whole global batch, however the tokens
        are spread over ranks and micro-batches.
        """
        engine = self.deepspeed
        engine.train()
        set_lr(self._optimizer, lr)
        shares = [self._shares.share(batch) for batch in micro_batches]
        weight = self._context.replicas.size / self._count_tokens(shares)
        self._weigh_balance(micro_batches)
        loss = torch.zeros((), device=self._context.device)
        for index, share in enumerate(shares):
            engine.set_gradient_accumulation_boundary(index == len(shares) - 1)
            part = self._loss_sum(share) * weight
            engine.backward(part, scale_wrt_gas=False)
            loss += part.detach()
        loss_scale = self.loss_scale
        norm = self._clip() if self._clips_itself else None
        engine.step()
        if norm is None:
            norm = engine.get_global_grad_norm()
        return StepResult(loss, norm, not engine.was_step_applied(), loss_scale)

    @torch.no_grad()
    def eval_loss(self, micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the loss over counted tokens, their number) on this rank, dropout off.

        Of this rank's tokens of ``micro_batches``, which have one shape; context ranks share the sequences.
        """
        self.deepspeed.eval()
        shares = [self._shares.share(batch) for batch in micro_batches]
        losses = torch.stack([self._loss_sum(share) for share in shares])
        counts = torch.stack([counted_tokens(share) for share in shares])
        return losses.double().sum(), counts.double().sum()

    @property
    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 in fp32 and bf16."""
        scale = getattr(self.deepspeed.optimizer, "loss_scale", 1.0)
        return float(scale)

    def expert_load(self) -> float | None:
        """The tokens of a layer's busiest expert in proportion to an even share, since this was last called.

        Of all layers the worst. Every rank calls this. None without experts.
        """
        if not self._has_experts:
            return None
        worst = torch.zeros((), device=self._context.device)
        for router in self._routers:
            load = self._context.sum_over_replicas(worst.new_zeros(router.num_experts) + router.load)
            worst = torch.maximum(worst, load.amax() / load.mean())
            router.load = 0.0
        if self._context.pipe.size > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._context.pipe.group)
        return float(worst)

    def _weigh_balance(self, micro_batches: Sequence[Batch]) -> None:
        """Let the balance loss of each sequence count as one of the global batch's.

        It enters in the backward, behind whatever the loss was multiplied by: weight and loss scale.
        """
        sequences = sum(len(batch.tokens) for batch in micro_batches) * self._context.data.size
        for router in self._routers:
            router.loss_weight = self.loss_scale * self._context.replicas.size / sequences

    def _loss_sum(self, share: Batch) -> torch.Tensor:
        return self._sum(self._objective(self._forward, share, self._context.tensor), share)

    def _forward(self, share: Batch) -> torch.Tensor:
        return self.deepspeed(share.tokens, places=self._shares.places(share))

    @staticmethod
    def _sum(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        return losses.sum() if batch.loss_mask is None else (losses * batch.loss_mask).sum()

    def _count_tokens(self, shares: Sequence[Batch]) -> torch.Tensor | float:
        """Counted tokens of the global batch. Without masks every rank knows the number already."""
        if all(share.loss_mask is None for share in shares):
            return float(sum(share.labels.numel() for share in shares) * self._context.replicas.size)
        counts = torch.stack([counted_tokens(share) for share in shares])
        return self._context.sum_over_replicas(counts.sum()).clamp(min=1.0)

    def _clip(self) -> float:
        """The gradient's norm, after scaling the gradient down to ``gradient_clipping`` (0: never).

        For stage 0, where DeepSpeed reports no norm: every data rank holds the whole averaged gradient (of
        experts, each expert rank its own), each tensor rank its part. The norm is read, as ZeRO does: the
        update is left out when it is not finite, and inf returned.
        """
        square = torch.zeros((), device=self._context.device)
        for is_expert in (False, True):
            owned = [p.grad for p in self._parameters if p.grad is not None and _counts(p, is_expert)]
            part = torch.nn.utils.get_total_norm(owned).square().to(square.device)
            if is_expert and self._context.expert.size > 1:
                dist.all_reduce(part, group=self._context.expert.group)
            square = square + part
        if self._context.tensor.size > 1:
            dist.all_reduce(square, group=self._context.tensor.group)
        norm = square.sqrt()
        value, limit = float(norm), self._own_clipping
        self.deepspeed.optimizer.overflow = not math.isfinite(value)
        if self.deepspeed.optimizer.overflow:
            return float("inf")
        if 0 < limit < value:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return value


def _counts(parameter: nn.Parameter, is_expert: bool) -> bool:
    """Whether this rank answers for ``parameter``, which is an expert's or is not."""
    spec = spec_of(parameter)
    return spec.owned and spec.is_expert == is_expert


def engine_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's dictionary for ``config``, with the paths chosen that are right and fast.

    - Stage 0 in fp32: clipping is ours (DeepSpeed's tells no norm, and reduces it over ranks twice).
    - 16-bit parameters: gradients are accumulated in fp32 (in bf16, small ones would be lost).
    - Our client optimizers are wanted whatever DeepSpeed thinks of them, also when offloaded.
    - ZeRO 1 and 2 send each gradient to the rank that updates it. DeepSpeed's default sums it on all of them:
      half as many bytes more in a step of stage 1, almost twice as many at stage 2 with many micro-batches.
    - The throughput timer synchronises the device twice a step: off. DeepSpeed prints no progress: we do.
    """
    settings = deepspeed_config(config)
    precision = config.precision.precision
    for owned in ("optimizer", "scheduler"):
        settings.pop(owned, None)
    stage = config.engine_stage
    zero = {**zero_settings(config), "stage": stage}
    settings["zero_optimization"] = zero
    if stage == 0:
        settings["gradient_clipping"] = 0.0
    zero.setdefault("use_multi_rank_bucket_allreduce", False)
    if precision != "fp32":
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if config.optimizer.type == "muon" and stage > 0:
        if config.optimizer.gradient_clipping > 0:
            LOGGER.info(
                "gradient_clipping is off: with Muon and ZeRO it would act on the orthogonalised update"
            )
        settings["gradient_clipping"] = 0.0
        zero["reduce_scatter"] = False
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    settings["steps_per_print"] = None
    settings["timers"] = {"throughput": {"enabled": False, "synchronized": False}}
    return settings


def counted_tokens(batch: Batch) -> torch.Tensor:
    """Number of tokens of ``batch`` that the loss counts, an fp32 scalar."""
    if batch.loss_mask is None:
        return torch.tensor(float(batch.labels.numel()), device=batch.labels.device)
    return batch.loss_mask.sum(dtype=torch.float32)
