"""Keys of the number formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from megatron_lite.config.fields import Bool, NonNegative, NonNegativeFloat, Positive, Section, derived


class Fp16Block(Section):
    """`fp16: {enabled: true, ...}`: half precision with a loss scale."""

    enabled: Bool = False
    """Train in fp16 (bf16 when `type` says so)."""
    fp16: Bool | None = None
    """Accepted for GPT-NeoX's files; `enabled` decides."""
    type: Literal["fp16", "bfloat16"] = "fp16"
    """GPT-NeoX's older way of asking for bf16."""
    loss_scale: NonNegativeFloat = 0.0
    """A fixed loss scale; 0 adapts it."""
    initial_scale_power: NonNegative = 16
    """The adaptive loss scale begins at 2 to this power."""
    loss_scale_window: Positive = 1000
    """Steps without overflow before the loss scale doubles."""
    hysteresis: Positive = 2
    """Overflows before the loss scale halves."""
    consecutive_hysteresis: Bool = False
    """Whether a good step refills the hysteresis."""
    min_loss_scale: NonNegativeFloat = 1.0
    """Smallest adaptive loss scale."""


class Bf16Block(Section):
    """`bf16: {enabled: true}`: bf16 parameters with fp32 master weights."""

    enabled: Bool = False
    """Train in bf16."""
    check_grad_overflow: Bool = True
    """Leave out an update whose gradient is not finite."""
    immediate_grad_update: Bool = False
    """Accumulate a gradient as soon as it is there."""


def _short(name: Any) -> Any:
    return (
        {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)
        if isinstance(name, str)
        else name
    )


class PrecisionSection(Section):
    """In which numbers the model computes."""

    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        BeforeValidator(_short, json_schema_input_type=Literal["fp32", "bf16", "fp16", "bfloat16"]),
    ] = derived("from the fp16 and bf16 blocks, or fp32")
    """Number format of parameters and activations (`bfloat16` is `bf16`); the master weights are fp32."""
    fp16: Fp16Block = Fp16Block()
    """Half precision and its loss scale."""
    bf16: Bf16Block = Bf16Block()
    """bfloat16."""
