"""Experts that are divided over replicas, as DeepSpeed has to be told of them.

DeepSpeed averages gradients over the replicas and partitions the optimizer's state among them. Of divided
experts it must do so among the ranks with the same experts only, and still divide the sum by the number of
replicas: the tokens of all of them have reached these experts. It does for its own layers, by marks on the
parameters and by process groups in a registry of its own: at stages 0 to 2 for ``MoE``, with parameter groups
that are marked, too, at stage 3 for those of its AutoEP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed import zero
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.utils import groups
from torch import nn

from megatron_lite.model.moe import MixtureOfExperts
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.training.mpu import process_group


class Partitioned(zero.Init):
    """ZeRO 3's ``Init``, which divides experts among the ranks that have the same ones."""

    def __init__(self, context: ParallelContext, enabled: bool, **options: Any) -> None:
        """``options`` are those of ``zero.Init``, too. Every rank makes one at the same time."""
        super().__init__(enabled=enabled, **options)
        self._experts: dict[str, Any] = {}
        if enabled and context.expert.size > 1:
            self._experts = {
                "ds_zero_partition_process_group": process_group(context.expert_replicas, context.rank),
                "ds_zero_partition_group_name": group_name(context.expert.size),
                "ds_zero_placement_family": "autoep_expert",
            }

    def _zero_init_param(self, param: nn.Parameter) -> None:
        if spec_of(param).is_expert:
            for name, value in self._experts.items():
                setattr(param, name, value)
        super()._zero_init_param(param)


@contextmanager
def declared_experts(model: nn.Module, context: ParallelContext, stage: int) -> Iterator[None]:
    """Within: ``deepspeed.initialize`` with ZeRO's ``stage`` takes ``model``'s experts for its own layer's.

    Every rank does this at the same time. Experts that every replica holds are parameters like any others.
    """
    _forget()
    if context.expert.size == 1:
        yield
        return
    mark_experts(model, context.expert.size)
    name = group_name(context.expert.size)
    groups._EXPERT_PARALLEL_GROUP[name] = process_group(context.expert, context.rank)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = process_group(context.expert_replicas, context.rank)
    groups.expert_tensor_parallel_world_size = context.tensor.size
    if stage == 3:  # the parameters' own marks are enough
        yield
        return
    theirs = deepspeed_engine.MoE
    deepspeed_engine.MoE = MixtureOfExperts
    try:
        yield
    finally:
        deepspeed_engine.MoE = theirs


def _forget() -> None:
    """Drop what an engine before declared; the groups are the context's."""
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    groups.expert_tensor_parallel_world_size = 1


def group_name(degree: int) -> str:
    """The name of the groups of experts divided over ``degree`` ranks; DeepSpeed reads the degree in it."""
    return f"ep_size_{degree}"


def mark_experts(model: nn.Module, degree: int) -> None:
    """Mark the parameters of experts that are divided over ``degree`` > 1 ranks."""
    for parameter in model.parameters():
        if spec_of(parameter).is_expert:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(degree)  # type: ignore[attr-defined]


def group_marks(parameter: nn.Parameter) -> dict[str, Any]:
    """What DeepSpeed wants in the optimizer's group of ``parameter``."""
    name = getattr(parameter, "group_name", None)
    return {} if name is None else {"moe": True, "name": name}
