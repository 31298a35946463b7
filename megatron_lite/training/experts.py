"""Experts that are divided over replicas, as DeepSpeed has to be told of them.

DeepSpeed averages gradients over the replicas and partitions the optimizer's state among them. Of divided
experts it must do so among the ranks with the same experts only, and still divide the sum by the number of
replicas: the tokens of all of them have reached these experts. It does for its own ``MoE`` layer, by marks on
the parameters, by process groups in a registry of its own, and by parameter groups that are marked, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.utils import groups
from torch import nn

from megatron_lite.model.moe import MixtureOfExperts
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.training.mpu import process_group


@contextmanager
def declared_experts(model: nn.Module, context: ParallelContext) -> Iterator[None]:
    """Within: ``deepspeed.initialize`` takes the experts of ``model`` for those of its own layer.

    Every rank does this at the same time. Experts that every replica holds are parameters like any others.
    """
    _forget()
    if context.expert.size == 1:
        yield
        return
    name = mark_experts(model, context.expert.size)
    groups._EXPERT_PARALLEL_GROUP[name] = process_group(context.expert, context.rank)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = process_group(context.expert_replicas, context.rank)
    groups.expert_tensor_parallel_world_size = context.tensor.size
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


def mark_experts(model: nn.Module, degree: int) -> str:
    """Mark the parameters of experts that are divided over ``degree`` > 1 ranks; the name of their groups."""
    name = f"ep_size_{degree}"  # DeepSpeed reads the degree out of it
    for parameter in model.parameters():
        if spec_of(parameter).is_expert:
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    return name


def group_marks(parameter: nn.Parameter) -> dict[str, Any]:
    """What DeepSpeed wants in the optimizer's group of ``parameter``."""
    name = getattr(parameter, "group_name", None)
    return {} if name is None else {"moe": True, "name": name}
