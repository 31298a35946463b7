"""Which elements each rank of a layout keeps on disk, worked out without starting it.

It follows what DeepSpeed does, so that a rank which loads a checkpoint cut this way reads its own files and
no others. Nothing depends on it: a checkpoint loads under any layout, however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from megatron_lite.checkpoint.fragments import layout_fragments
from megatron_lite.checkpoint.layouts.layout import Holder, Layout, offsets_of, parts_of_flat
from megatron_lite.checkpoint.rewrite import Span
from megatron_lite.config import Config
from megatron_lite.config.placement import groups_by_axis
from megatron_lite.model import build_gpt
from megatron_lite.model.ends import Head
from megatron_lite.model.gpt import layer_plans
from megatron_lite.parallel.context import Axis, ParallelContext, axis_among
from megatron_lite.parallel.parameter import DTYPES, ParameterFactory
from megatron_lite.training.experts import mark_experts
from megatron_lite.training.optimizers import for_muon, parameter_groups
from megatron_lite.training.stages import META, stage_bounds

ALIGNMENT = 2
"""ZeRO 1 and 2 fill a group up to a multiple of this for each rank (``nccl_start_alignment_factor``)."""


def shares_of(config: Config) -> list[list[Span]]:
    """By rank, what it stores of the weights; all together cover each parameter exactly once."""
    shares = []
    for context, model in _ranks(config):
        layout = Layout(_holders(config, model, context), list(model.parameters()), None, _nothing)
        fragments = [f for f in layout_fragments(layout, context) if f.owned[0] < f.owned[1]]
        shares.append([Span(f.name, f.region, *f.owned) for f in fragments])
    return shares


def modules_by_rank(config: Config) -> list[nn.Module]:
    """By rank, its part of the model, without storage; ranks with the same part have it in common."""
    return [model for _, model in _ranks(config)]


def _ranks(config: Config) -> Iterator[tuple[ParallelContext, nn.Module]]:
    models: dict[tuple[int, ...], nn.Module] = {}
    groups, world_size = groups_by_axis(config.parallel), config.parallel.world_size
    for rank in range(world_size):
        axes = {name: axis_among(groups[name], rank) for name in groups}
        context = ParallelContext(rank, world_size, local_rank=0, device=META, **axes)
        key = (context.pipe.rank, context.tensor.rank, context.expert.rank)
        if key not in models:
            models[key] = _model(config, context)
        yield context, models[key]


def _model(config: Config, context: ParallelContext) -> nn.Module:
    """The parameters of one rank, in the order in which DeepSpeed meets them, without storage."""
    factory = ParameterFactory.of_rank(config, context, DTYPES[config.precision.precision], META)
    if context.pipe.size == 1:
        return build_gpt(config, factory)
    plans = layer_plans(config.model, factory)
    bounds = stage_bounds(config.parallel.pipe_partition_method, plans, context.pipe.size)
    layers = [plan.build() for plan in plans[bounds[context.pipe.rank] : bounds[context.pipe.rank + 1]]]
    if not config.model.no_weight_tying:
        # DeepSpeed keeps tied layers apart, before the others; the first stage answers for the matrix.
        layers.sort(key=lambda layer: not hasattr(layer, "weight"))
        for layer in layers:
            if isinstance(layer, Head):
                layer.weight.ds_pipe_replicated = True  # type: ignore[attr-defined]
    return nn.ModuleList(layers)


def _holders(config: Config, model: nn.Module, context: ParallelContext) -> list[Holder]:
    """Where the optimizer of ``context``'s rank has the parameters (see ``checkpoint/layouts``)."""
    stage = config.engine_stage
    if context.expert.size > 1:
        mark_experts(model, context.expert.size)
    groups = parameter_groups(model, 0.0)
    if config.optimizer.type == "muon":
        groups = for_muon(groups)
    if stage == 0:
        return [_whole(parameter) for group in groups for parameter in group["params"]]
    axes = [context.expert_replicas if "moe" in group else context.replicas for group in groups]
    if stage == 3:
        return [
            _slice(each, axis) for group, axis in zip(groups, axes, strict=True) for each in group["params"]
        ]
    return [_partition(group["params"], axis) for group, axis in zip(groups, axes, strict=True)]


def _whole(parameter: nn.Parameter) -> Holder:
    return Holder(parameter, parts_of_flat([parameter], [0], 0, parameter.numel()), replicated=True)


def _slice(parameter: nn.Parameter, axis: Axis) -> Holder:
    """ZeRO 3: an equal slice of each parameter."""
    size = -(-parameter.numel() // axis.size)
    parts = parts_of_flat([parameter], [0], axis.rank * size, (axis.rank + 1) * size)
    return Holder(torch.empty(size, device=META), parts, replicated=False)


def _partition(group: list[nn.Parameter], axis: Axis) -> Holder:
    """ZeRO 1 and 2: an equal slice of a group's parameters laid end to end."""
    unit = ALIGNMENT * axis.size
    size = -(-sum(parameter.numel() for parameter in group) // unit) * ALIGNMENT
    parts = parts_of_flat(group, offsets_of(group), axis.rank * size, (axis.rank + 1) * size)
    return Holder(torch.empty(size, device=META), parts, replicated=False)


def _nothing() -> None:
    """There is no engine whose parameters would be made anew."""
