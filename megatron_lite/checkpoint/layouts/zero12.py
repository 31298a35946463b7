"""ZeRO 1 and 2: each rank holds an equal slice of each group's parameters laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.checkpoint.layouts.layout import (
    Holder,
    Layout,
    Packed,
    Part,
    offsets_of,
    parts_of_flat,
    whole_parts,
)

MOMENTUM = "momentum_buffer"


def stage1_and_2(wrapper: Any) -> Layout:
    """``DeepSpeedZeroOptimizer``: stages 1 and 2 in any precision, offloaded to CPU memory or not.

    The parts are computed from the buffers' order: the wrapper's own ``_hp_mapping`` is wrong when
    ``round_robin_gradients`` reorders the parameters.
    """
    holders = []
    for number, partition in enumerate(wrapper.single_partition_of_fp32_groups):
        parameters = wrapper.round_robin_bit16_groups[number]
        parts = _parts(wrapper, number, parameters, wrapper.round_robin_bit16_offsets[number], partition)
        packed = None
        if _is_muon(wrapper, number):
            packed = (
                Packed(MOMENTUM, partition.numel(), parts)
                if wrapper.cpu_offload
                else _whole_momenta(wrapper.params_in_partition[number])
            )
        holders.append(Holder(partition, parts, False, wrapper.optimizer, number, packed))
    trained = [parameter for group in wrapper.bit16_groups for parameter in group]
    scaler = wrapper.loss_scaler if wrapper.dynamic_loss_scale else None
    return Layout(holders, trained, wrapper.optimizer, wrapper.update_lp_params, scaler)


def bf16_stage1(wrapper: Any) -> Layout:
    """``BF16_Optimizer``: what DeepSpeed makes of stage 1 in bf16 with gradients accumulated in fp32."""
    holders = []
    for number, partition in enumerate(wrapper.fp32_groups_flat_partition):
        parameters = wrapper.bf16_groups[number]
        parts = _parts(wrapper, number, parameters, offsets_of(parameters), partition)
        packed = Packed(MOMENTUM, partition.numel(), parts) if _is_muon(wrapper, number) else None
        holders.append(Holder(partition, parts, False, wrapper.optimizer, number, packed))
    trained = [parameter for group in wrapper.bf16_groups for parameter in group]
    return Layout(holders, trained, wrapper.optimizer, wrapper.update_lp_params)


def _parts(
    wrapper: Any,
    number: int,
    parameters: Sequence[nn.Parameter],
    offsets: Sequence[int],
    partition: torch.Tensor,
) -> tuple[Part, ...]:
    start = dist.get_rank(group=wrapper.real_dp_process_group[number]) * partition.numel()
    return parts_of_flat(parameters, offsets, start, start + partition.numel())


def _is_muon(wrapper: Any, number: int) -> bool:
    return bool(wrapper.optimizer.param_groups[number].get("use_muon", False))


def _whole_momenta(parameters: Sequence[nn.Parameter]) -> Packed:
    """Muon's momentum without offload: of each matrix that touches the partition, whole, end to end."""
    places = zip(parameters, offsets_of(parameters), strict=True)
    parts = tuple(part for p, offset in places for part in whole_parts(p, offset))
    return Packed(MOMENTUM, sum(part.numel for part in parts), parts)
