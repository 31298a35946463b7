"""A :class:`Config` as the dictionary DeepSpeed's engine reads."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.config import Config


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The engine's configuration. The optimizer and the schedule are objects of our own and are not in it.

    Context ranks are data-parallel ones to DeepSpeed: it counts each sequence once for every rank of it.
    """
    result: dict[str, Any] = {
        "train_batch_size": config.batch.train_batch_size * config.parallel.context_parallel_size,
        "train_micro_batch_size_per_gpu": config.batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.batch.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": config.zero.block,
        "wall_clock_breakdown": config.logging.wall_clock_breakdown,
    }
    result |= _precision(config)
    blocks = config.deepspeed.model_dump(mode="json", exclude_defaults=True)
    extra = blocks.pop("deepspeed_extra_args", {})
    return result | blocks | extra


def _precision(config: Config) -> dict[str, Any]:
    """The fp16 or bf16 block that is on."""
    section = config.precision
    if section.precision == "fp16":
        block = section.fp16.model_dump(exclude={"fp16", "type", "enabled"})
        return {"fp16": block | {"enabled": True}}
    if section.precision == "bf16":
        return {"bf16": section.bf16.model_dump() | {"enabled": True}}
    return {}
