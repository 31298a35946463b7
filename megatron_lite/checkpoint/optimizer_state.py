"""The optimizer's state beside its tensors: numbers such as ``step``, and state that does not exist yet."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from megatron_lite.checkpoint.index import Index, ParameterEntry
from megatron_lite.checkpoint.layouts.layout import Holder, Layout
from megatron_lite.checkpoint.signs import Sign, unheard


def scalars_of(holder: Holder) -> dict[str, float]:
    """The numbers in the optimizer's state of ``holder``: 0-dim tensors and Python numbers."""
    numbers = {}
    for kind, value in holder.state.items():
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            numbers[kind] = value.item()
        elif isinstance(value, int | float):
            numbers[kind] = value
    return numbers


def collect_scalars(layout: Layout) -> dict[str, dict[str, float]]:
    """By parameter, the numbers of its optimizer state.

    Parameters that share a holder share its numbers.
    """
    by_holder = [scalars_of(holder) for holder in layout.holders]
    if type(layout.optimizer).__name__ == "FusedAdam":
        _share_steps(layout, by_holder)
    return {
        part.name: numbers
        for holder, numbers in zip(layout.holders, by_holder, strict=True)
        if numbers
        for part in holder.parts
    }


def _share_steps(layout: Layout, by_holder: list[dict[str, float]]) -> None:
    """Give all of a group the step of the group, as DeepSpeed's FusedAdam means it.

    It updates a group in one launch, with the step of the group's last parameter with a gradient, and counts
    in that one's state only (``ops/adam/fused_adam.py``, after the loop): three parameters after 5 steps hold
    0, 0 and 5. Other optimizers count for each parameter, and a 0 is a 0.
    """
    steps: dict[int, float] = defaultdict(float)
    for holder, numbers in zip(layout.holders, by_holder, strict=True):
        steps[holder.group] = max(steps[holder.group], numbers.get("step", 0))
    for holder, numbers in zip(layout.holders, by_holder, strict=True):
        if "step" in numbers:
            numbers["step"] = steps[holder.group]


def restore_scalars(holder: Holder, parameters: dict[str, ParameterEntry]) -> None:
    """Set the numbers of ``holder``'s state, keeping the types that its optimizer made them with.

    A holder of several parameters takes the largest: a parameter without gradients may have been stepped less
    often where it had a state of its own.
    """
    saved = [parameters[part.name].scalars for part in holder.parts]
    for kind, value in holder.state.items():
        numbers = [scalars[kind] for scalars in saved if kind in scalars]
        if not numbers:
            continue
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            value.fill_(max(numbers))
        elif isinstance(value, int | float):
            holder.set_number(kind, type(value)(max(numbers)))


def make_state(layout: Layout, index: Index, sign: Sign = unheard) -> None:
    """Let the optimizer make the state that it makes lazily, for the holders whose state the checkpoint has.

    Nobody but the optimizer knows the names, types and shapes of its state, so it takes a step with zero
    gradients at rate 0, one holder at a time (the extra memory is that holder's gradient). That leaves the
    weights as they were; what it does to the state does not matter, that is filled afterwards. ``sign`` is
    told of every holder.
    """
    for holder in layout.holders:
        sign("making the optimizer's state")
        saved = any(index.parameters[part.name].state_kinds for part in holder.parts)
        if holder.optimizer is None or holder.state or not saved:
            continue
        if holder.packed is not None:
            holder.optimizer.state[holder.tensor] = {
                holder.packed.kind: torch.zeros(
                    holder.packed.numel, dtype=holder.tensor.dtype, device=holder.tensor.device
                )
            }
        else:
            _step_alone(holder, holder.optimizer)


def _step_alone(holder: Holder, optimizer: torch.optim.Optimizer) -> None:
    """One step of ``optimizer`` on ``holder`` only, with a gradient of zeros and rate 0."""
    held = [group["params"] for group in optimizer.param_groups]
    own_group = optimizer.param_groups[holder.group]
    rate = own_group["lr"]
    with holder.in_memory() as tensor:
        gradient = tensor.grad
        try:
            for group in optimizer.param_groups:
                group["params"] = []
            own_group.update(params=[tensor], lr=0.0)
            tensor.grad = torch.zeros_like(tensor)
            optimizer.step()
        finally:
            tensor.grad = gradient
            own_group["lr"] = rate
            for group, parameters in zip(optimizer.param_groups, held, strict=True):
                group["params"] = parameters


def replay_native_steps(layout: Layout) -> None:
    """Bring DeepSpeedCPUAdam's C++ object to the step that its state is at.

    It keeps beta ** step as a running fp32 product, and on a jump of the step count takes a power instead,
    whose last bits differ (``IncrementStep`` in ``cpu_adam.h``). Empty updates from step 0 on repeat the
    product.
    """
    optimizer: Any = layout.optimizer
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    steps = max((int(scalars_of(holder).get("step", 0)) for holder in layout.holders), default=0)
    empty = torch.empty(0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    for step in range(steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, empty, empty, empty, empty
        )
