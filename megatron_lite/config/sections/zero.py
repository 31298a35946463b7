"""Keys of ZeRO: how optimizer state, gradients and parameters are shared."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from megatron_lite.config.fields import Block, Section

PASSED = frozenset(
    {
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "zenflow",
        "sub_group_size",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
        "leaf_module",
    }
)
"""What else DeepSpeed's block holds; handed on as it is."""

REMOVED = frozenset({"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"})


class ZeroBlock(Section):
    """DeepSpeed's `zero_optimization` block. Its other names are handed to DeepSpeed as they are."""

    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Block | None = None
    """`{device: cpu}` keeps the optimizer state in the machine's memory (stages 1 to 3)."""
    offload_param: Block | None = None
    """`{device: cpu}` keeps the parameters there too (stage 3)."""

    @model_validator(mode="after")
    def _known(self) -> ZeroBlock:
        for key in self.model_extra or {}:
            if key in REMOVED:
                raise ValueError(f"DeepSpeed has removed {key}; leave it out")
            if key not in PASSED:
                near = difflib.get_close_matches(key, [*PASSED, *type(self).model_fields], n=1)
                raise ValueError(f"there is no key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        return self


class ZeroSection(Section):
    """ZeRO."""

    zero_optimization: ZeroBlock = ZeroBlock()
    """ZeRO's stage and settings."""

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return self.zero_optimization.stage

    @property
    def offload_optimizer(self) -> bool:
        """Whether the optimizer state leaves the device."""
        return _leaves(self.zero_optimization.offload_optimizer)

    @property
    def offload_param(self) -> bool:
        """Whether the parameters leave the device."""
        return _leaves(self.zero_optimization.offload_param)

    @property
    def block(self) -> dict[str, Any]:
        """The whole block, for DeepSpeed."""
        return self.zero_optimization.model_dump(mode="json", exclude_none=True)


def _leaves(block: Block | None) -> bool:
    return block is not None and block.get("device", "none") != "none"
