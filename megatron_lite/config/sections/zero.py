"""Keys of ZeRO: how optimizer state, gradients and parameters are shared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, model_validator

from megatron_lite.config.fields import Block, Bool, Positive, Section
from megatron_lite.config.inner_keys import check_keys, holding

PASSED: dict[str, type] = dict.fromkeys(
    (
        "contiguous_gradients",
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "cpu_offload_use_pin_memory",
        "gather_16bit_weights_on_model_save",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_quantized_nontrainable_weights",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
    ),
    bool,
)
PASSED |= dict.fromkeys(
    (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "module_granularity_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
    ),
    int,
)
PASSED |= {"zenflow": dict, "leaf_module": dict}
"""What else DeepSpeed's block holds, and of which type; handed on as it is."""

REMOVED = frozenset({"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"})

OFFLOADS = ("offload_optimizer", "offload_param")

OFFLOAD: dict[str, type] = {"device": str, "nvme_path": str, "buffer_count": int, "pin_memory": bool}
"""What both blocks hold; each has more."""

OFFLOAD_PARAM = OFFLOAD | {"buffer_size": int, "max_in_cpu": int}

OFFLOAD_OPTIMIZER = OFFLOAD | {
    "pipeline_read": bool,
    "pipeline_write": bool,
    "fast_init": bool,
    "ratio": float,
    "super_offload": bool,
    "cpuadam_cores_perc": float,
}


class ZeroBlock(Section):
    """DeepSpeed's `zero_optimization` block. Its other names are handed to DeepSpeed as they are."""

    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Annotated[Block, holding(OFFLOAD_OPTIMIZER)] | None = None
    """Where the optimizer state is: `{device: cpu}` in the machine's memory (stages 1 to 3), `{device: nvme,
    nvme_path: FOLDER}` in files (stage 3; needs libaio)."""
    offload_param: Annotated[Block, holding(OFFLOAD_PARAM)] | None = None
    """Where the parameters are (stage 3): as above. With nvme, `max_in_cpu` of them stay in memory."""
    zero_hpz_partition_size: Positive | None = None
    """ZeRO++'s hierarchical partitioning (stage 3): so many neighbouring ranks, those of a machine, hold all
    parameters between them a second time, so that the backward gathers within the machine."""
    zero_quantized_weights: Bool | None = None
    """ZeRO++ (stage 3, GPU only): parameters are gathered in 8 bits, which changes the loss a little."""
    zero_quantized_gradients: Bool | None = None
    """ZeRO++ (stage 3, GPU only): gradients are summed in 4 bits between machines and 8 within, which changes
    the loss a little."""
    overlap_comm: Bool | None = None
    """Reduce gradients while the backward goes on, on an accelerator's second stream; of no effect on a CPU.
    None: DeepSpeed's choice (stage 3 does)."""

    @model_validator(mode="after")
    def _known(self) -> ZeroBlock:
        for key in self.model_extra or {}:
            if key in REMOVED:
                raise ValueError(f"DeepSpeed has removed {key}; leave it out")
            if key == "compute_grad_norm":
                raise ValueError(f"{key}: by the norm a gradient that is not finite is found; leave it out")
        check_keys(self.model_extra or {}, PASSED, others=type(self).model_fields)
        return self

    @model_validator(mode="after")
    def _offloads(self) -> ZeroBlock:
        if (self.model_extra or {}).get("zenflow") is not None:
            raise ValueError("zenflow: its runs could not be saved; leave it out")
        if (self.model_extra or {}).get("save_muon_momentum_buffer_in_memory"):
            raise ValueError(
                "save_muon_momentum_buffer_in_memory: a run that goes on from a checkpoint would lose the "
                "momentum; leave it out"
            )
        for name in OFFLOADS:
            block = getattr(self, name) or {}
            device = block.get("device", "none")
            if device not in ("none", "cpu", "nvme"):
                raise ValueError(f"{name}.device is {device!r}; it can be none, cpu or nvme")
            if device == "nvme" and not block.get("nvme_path"):
                raise ValueError(f"{name} needs nvme_path, a folder on the NVMe disk")
            if device == "nvme" and self.stage != 3:
                raise ValueError(f"{name}.device nvme needs stage 3, but the stage is {self.stage}")
            if block.get("ratio", 1.0) != 1.0:
                raise ValueError(
                    f"{name}.ratio: what DeepSpeed keeps on the GPU would stay at the first learning rate "
                    "for the whole run; leave it out"
                )
            if block.get("super_offload"):
                raise ValueError(f"{name}.super_offload: its runs could not be saved; leave it out")
        return self

    @model_validator(mode="after")
    def _plus_plus(self) -> ZeroBlock:
        asked = {
            "zero_hpz_partition_size": (self.zero_hpz_partition_size or 1) > 1,
            "zero_quantized_weights": self.zero_quantized_weights,
            "zero_quantized_gradients": self.zero_quantized_gradients,
        }
        for name, given in asked.items():
            if given and self.stage != 3:
                raise ValueError(f"{name} needs stage 3, but the stage is {self.stage}")
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
        return _device(self.zero_optimization.offload_optimizer) != "none"

    @property
    def offload_param(self) -> bool:
        """Whether the parameters leave the device."""
        return _device(self.zero_optimization.offload_param) != "none"

    @property
    def swaps_optimizer(self) -> bool:
        """Whether the optimizer state is on NVMe."""
        return _device(self.zero_optimization.offload_optimizer) == "nvme"

    @property
    def swaps_parameters(self) -> bool:
        """Whether parameters are on NVMe."""
        return _device(self.zero_optimization.offload_param) == "nvme"

    @property
    def block(self) -> dict[str, Any]:
        """The whole block, for DeepSpeed."""
        return self.zero_optimization.model_dump(mode="json", exclude_none=True)


def _device(block: Block | None) -> str:
    return str((block or {}).get("device", "none"))
