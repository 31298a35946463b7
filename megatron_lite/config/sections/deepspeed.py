"""Keys handed to DeepSpeed as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_lite.config.fields import Block, Bool, PositiveFloat, Section
from megatron_lite.config.inner_keys import named

FLOPS_PROFILER = "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"
DATA_TYPES = "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"
AIO = "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"

EXTRA = frozenset(
    {
        "activation_checkpointing",
        "checkpoint",
        "comet",
        "compile",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "expert_parallel",
        "gradient_allreduce_op",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "pipeline",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensor_parallel",
        "timers",
        "torch_autocast",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
"""What DeepSpeed's configuration has and no key of ours says."""


class DeepSpeedSection(Section):
    """DeepSpeed's own keys; https://www.deepspeed.ai/docs/config-json describes each block."""

    prescale_gradients: Bool = False
    """Divide gradients before they are summed over ranks."""
    gradient_predivide_factor: PositiveFloat = 1.0
    """By how much, with `prescale_gradients`."""
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format in which gradients are summed. None: DeepSpeed's choice."""
    data_types: Annotated[Block, named(DATA_TYPES)] | None = None
    """`{grad_accum_dtype: fp32}`: format in which gradients are accumulated."""
    dump_state: Bool = False
    """Print DeepSpeed's state at start."""
    flops_profiler: Annotated[Block, named(FLOPS_PROFILER)] | None = None
    """Profile one step."""
    comms_logger: Annotated[Block, named("enabled prof_all prof_ops verbose debug")] | None = None
    """Log every collective."""
    aio: Annotated[Block, named(AIO)] | None = None
    """Asynchronous reads and writes of NVMe offload."""
    tensorboard: Annotated[Block, named("enabled output_path job_name")] | None = None
    """DeepSpeed's TensorBoard monitor."""
    wandb: Annotated[Block, named("enabled group team project")] | None = None
    """DeepSpeed's Weights & Biases monitor."""
    csv_monitor: Annotated[Block, named("enabled output_path job_name")] | None = None
    """DeepSpeed's CSV monitor."""
    deepspeed_extra_args: Block | None = None
    """Anything else for DeepSpeed's configuration."""
