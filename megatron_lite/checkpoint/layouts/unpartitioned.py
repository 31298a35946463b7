"""ZeRO 0: every data-parallel rank holds everything."""

from __future__ import annotations

from typing import Any

import torch
from torch._utils import _unflatten_dense_tensors

from megatron_lite.checkpoint.layouts.layout import Holder, Layout, offsets_of, whole_parts


def parameters_themselves(optimizer: torch.optim.Optimizer | None) -> Layout:
    """fp32 (or autocast): the optimizer updates the model's parameters in place."""
    groups = optimizer.param_groups if optimizer is not None else []
    trained = [(number, parameter) for number, group in enumerate(groups) for parameter in group["params"]]
    holders = [Holder(p, whole_parts(p), True, optimizer, number) for number, p in trained]
    return Layout(holders, [p for _, p in trained], optimizer, refresh=lambda: None)


def fp32_copies(wrapper: Any) -> Layout:
    """bf16 and fp16 (``FP16_UnfusedOptimizer``): one fp32 copy of each parameter."""
    holders = [
        Holder(copy, whole_parts(parameter), True, wrapper.optimizer, number)
        for number, (copies, parameters) in enumerate(
            zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        )
        for copy, parameter in zip(copies, parameters, strict=True)
    ]

    def refresh() -> None:
        for copies, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for copy, parameter in zip(copies, parameters, strict=True):
                parameter.data.copy_(copy.data)

    trained = [parameter for group in wrapper.fp16_groups for parameter in group]
    return Layout(holders, trained, wrapper.optimizer, refresh, wrapper.loss_scale_config)


def fp32_flat_copies(wrapper: Any) -> Layout:
    """bf16 and fp16 with DeepSpeed's FusedAdam (``FP16_Optimizer``): one flat fp32 copy of each group."""
    holders = []
    for number, (flat, parameters) in enumerate(
        zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True)
    ):
        places = zip(parameters, offsets_of(parameters), strict=True)
        parts = tuple(part for parameter, offset in places for part in whole_parts(parameter, offset))
        holders.append(Holder(flat, parts, True, wrapper.optimizer, number))

    def refresh() -> None:
        for flat, parameters in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True):
            for parameter, value in zip(parameters, _unflatten_dense_tensors(flat, parameters), strict=True):
                parameter.data.copy_(value.data)

    trained = [parameter for group in wrapper.fp16_groups for parameter in group]
    return Layout(holders, trained, wrapper.optimizer, refresh, wrapper.loss_scale_config)
