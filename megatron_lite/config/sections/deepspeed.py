"""Keys handed to DeepSpeed as they are."""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.fields import Block, Bool, PositiveFloat, Section


class DeepSpeedSection(Section):
    """DeepSpeed's own keys; https://www.deepspeed.ai/docs/config-json describes each block."""

    prescale_gradients: Bool = False
    """Divide gradients before they are summed over ranks."""
    gradient_predivide_factor: PositiveFloat = 1.0
    """By how much, with `prescale_gradients`."""
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format in which gradients are summed. None: DeepSpeed's choice."""
    data_types: Block | None = None
    """`{grad_accum_dtype: fp32}`: format in which gradients are accumulated."""
    dump_state: Bool = False
    """Print DeepSpeed's state at start."""
    flops_profiler: Block | None = None
    """Profile one step."""
    comms_logger: Block | None = None
    """Log every collective."""
    aio: Block | None = None
    """Asynchronous reads and writes of NVMe offload."""
    tensorboard: Block | None = None
    """DeepSpeed's TensorBoard monitor."""
    wandb: Block | None = None
    """DeepSpeed's Weights & Biases monitor."""
    csv_monitor: Block | None = None
    """DeepSpeed's CSV monitor."""
    deepspeed_extra_args: Block | None = None
    """Anything else for DeepSpeed's configuration."""
