"""ZeRO 3: each rank holds an equal slice of every parameter."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.layouts.layout import Holder, Layout, Part, parts_of
from megatron_lite.checkpoint.layouts.swapped import SwappedHolder, parameter_slice, swapped_holder


def stage3(wrapper: Any) -> Layout:
    """``DeepSpeedZeroOptimizer_Stage3``: parameters and optimizer on the device, in CPU memory or on NVMe."""
    holders: list[Holder] = []
    for sub_group, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        parts: list[Part] = []
        offset = 0
        for parameter in wrapper.fp16_groups[sub_group]:
            parts.extend(_parts(parameter, offset))
            offset += parameter.partition_numel()
        if wrapper._swappable_optimizer_subgroup(sub_group):
            holders.append(swapped_holder(wrapper, sub_group, tuple(parts)))
        else:
            group = wrapper.sub_group_to_group_id[sub_group]
            holders.append(Holder(flat, tuple(parts), False, wrapper.optimizer, group))

    def refresh() -> None:
        wrapper.checkpoint_event_prologue()  # small parameters stay gathered between steps: let go of them
        for sub_group, holder in enumerate(holders[: len(wrapper.fp16_groups)]):
            if isinstance(holder, SwappedHolder):
                holder.refresh_parameters()
            else:
                wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        wrapper.invalidate_secondary_tensor()  # hpZ's copies within a machine
        wrapper.checkpoint_event_epilogue()  # and gather them again

    trained = [parameter for group in wrapper.fp16_groups for parameter in group]
    scaler = wrapper.loss_scaler if wrapper.dynamic_loss_scale else None
    return Layout(holders, trained, wrapper.optimizer, refresh, scaler)


def untrained_partition(parameter: Any) -> Holder:
    """The slice of a frozen parameter."""
    data, folder = parameter_slice(parameter)
    return Holder(data, _parts(parameter, 0), False, folder=folder)


def _parts(parameter: Any, offset: int) -> tuple[Part, ...]:
    """This rank's slice; none where it is all padding."""
    size = parameter.partition_numel()
    start = parameter.ds_zero_partition_rank * size
    stop = min(start + size, parameter.ds_numel)
    return parts_of(parameter, start, stop, offset)
