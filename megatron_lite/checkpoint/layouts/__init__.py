"""One description of an engine's state for each way DeepSpeed has of keeping it.

Written against DeepSpeed 0.19.8. The wrappers are told apart by class name: importing their modules costs
seconds (ZeRO imports Inductor through Muon), and a subclass with state of its own (ZenFlow, SuperOffload)
must not pass for its base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lite.checkpoint.layouts import unpartitioned, zero3, zero12
from megatron_lite.checkpoint.layouts.layout import Holder, Layout, whole_parts
from megatron_lite.utils.errors import CheckpointError

_LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "FP16_UnfusedOptimizer": unpartitioned.fp32_copies,
    "FP16_Optimizer": unpartitioned.fp32_flat_copies,
    "BF16_Optimizer": zero12.bf16_stage1,
    "DeepSpeedZeroOptimizer": zero12.stage1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": zero3.stage3,
}


def layout_of(engine: Any) -> Layout:
    """How ``engine`` (DeepSpeed's) keeps its parameters and optimizer state on this rank.

    Raises:
        CheckpointError: DeepSpeed keeps them in a way that is not supported.
    """
    wrapper = engine.optimizer
    name = type(wrapper).__name__
    if name in _LAYOUTS:
        layout = _LAYOUTS[name](wrapper)
    elif wrapper is None or isinstance(wrapper, torch.optim.Optimizer):
        layout = unpartitioned.parameters_themselves(wrapper)
    else:
        raise CheckpointError(
            f"checkpoints of a run under DeepSpeed's {name} are not supported; switch that feature off"
        )
    layout.holders.extend(_untrained(engine, layout))
    return layout


def _untrained(engine: Any, layout: Layout) -> list[Holder]:
    """Holders of the parameters that no optimizer has: frozen ones, or all without an optimizer."""
    trained = {id(p) for p in layout.trained}
    holders = []
    for parameter in engine.module.parameters():
        if id(parameter) in trained:
            continue
        if hasattr(parameter, "ds_tensor"):
            holders.append(zero3.untrained_partition(parameter))
        else:
            holders.append(Holder(parameter.data, whole_parts(parameter), replicated=True))
    return holders
