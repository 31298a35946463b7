"""How much memory one rank needs, part by part, by formula."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_lite.config import Config
from megatron_lite.planner.activations import activation_bytes, element_bytes, logits_bytes
from megatron_lite.planner.parameters import ParameterCount, parameters_on_rank
from megatron_lite.planner.swap import (
    PARAMETER_BUFFERS,
    largest_sub_group,
    matrices_on_rank,
    optimizer_buffers,
    partitions,
    swap_keys,
)

FP32 = 4
ADAM_STATE_BYTES = 2 * FP32
"""Two moments per parameter."""

CPU_RUNTIME_BYTES = 400 << 20
"""A rank before it has a model: Python, torch, DeepSpeed (measured)."""

GPU_RUNTIME_BYTES = 1 << 30
"""On the GPU, before the model: CUDA's context, the libraries' workspaces, NCCL's buffers."""

GPU_HOST_BYTES = 3 << 30
"""In main memory, for a rank that computes on a GPU: as on a CPU, and CUDA's libraries."""

LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters``, and of ``offload_param``'s ``max_in_cpu``."""

BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in elements."""

BACKWARD_ONLY = ("activations", "logits", "communication")
"""Parts that are gone when the update begins, by name."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one rank in bytes.

    Attributes:
        device: by part, in the memory of the device that computes (main memory on a CPU).
        host: by part, in main memory because it is offloaded there.
        disk: by part, in files on NVMe because it is offloaded there.
    """

    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def device_total(self) -> int:
        """Bytes on the computing device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes in main memory beside a computing device."""
        return sum(self.host.values())

    @property
    def disk_total(self) -> int:
        """Bytes in swap files."""
        return sum(self.disk.values())


def estimate_memory(config: Config, on_gpu: bool = False) -> MemoryEstimate:
    """The peak memory of one rank of ``config``'s run. ``vocab_size`` must be known.

    The model states follow ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3) with what DeepSpeed
    keeps on top: gradients accumulated in fp32, an fp32 copy of the gradients during the update, buckets of
    gradients on their way, and at stage 3 the parameters gathered for use. Activations: see
    :mod:`megatron_lite.planner.activations`.
    """
    device, host = _model_states(config, on_gpu)
    device["activations"] = activation_bytes(config, on_gpu)
    device["logits"] = logits_bytes(config, on_gpu)
    device["communication"] = _bucket_bytes(config, on_gpu)
    device["runtime"] = GPU_RUNTIME_BYTES if on_gpu else CPU_RUNTIME_BYTES
    # The update starts when activations and logits are gone: only the larger of the two counts.
    device["update"] = max(0, device["update"] - device["activations"] - device["logits"])
    host |= _swap_buffers(config, not_in_update=sum(device[part] for part in BACKWARD_ONLY))
    disk = _swap_files(config)
    if config.checkpoint.async_save:
        (disk if config.zero.swaps_optimizer else host)["copy being saved"] = _share_of_checkpoint(config)
    if on_gpu:
        host["runtime"] = GPU_HOST_BYTES
        if config.zero.stage < 3:
            host["model while it is built"] = parameters_on_rank(config).total * element_bytes(config)
    return MemoryEstimate(_without_zeros(device), _without_zeros(host), disk)


def _without_zeros(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size}


def _model_states(config: Config, on_gpu: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters, gradients, optimizer and the update's temporary copies: on the device and on the host."""
    count = parameters_on_rank(config)
    stage, width, zero = config.engine_stage, element_bytes(config), config.zero
    shard = _shard(config, count)
    held = shard if stage >= 3 else count.total
    # Stage 0 updates the parameters themselves; the other stages update an fp32 copy.
    master, optimizer = _optimizer_bytes(config)
    device = {
        "parameters": held * width,
        "gathered parameters": _gathered(
            config, count.total - (0 if zero.offload_param and on_gpu else held)
        ),
        "gradients": (shard if stage >= 2 else count.total) * FP32,
        "optimizer": optimizer,
        "update": master,
    }
    host: dict[str, int] = {}
    if zero.offload_optimizer:
        device["optimizer"] = device["update"] = 0
        if stage == 3:  # gradients are accumulated where the optimizer is
            host["gradients"] = device.pop("gradients")
        if not zero.swaps_optimizer:
            # The gradients' fp32 copy, and the new parameters on their way back.
            gradients = host.get("gradients", 0) + master
            host |= {"optimizer": optimizer, "gradients": gradients, "update": width * master // FP32}
    if zero.offload_param:
        kept = min(held, _max_in_cpu(config)) if zero.swaps_parameters else held
        device["parameters"], host["parameters"] = 0, kept * width
    if (zero.zero_optimization.zero_hpz_partition_size or 1) > 1:
        second = -(-count.total // (zero.zero_optimization.zero_hpz_partition_size or 1))
        (host if zero.offload_param else device)["second partition"] = second * width
    return device, host


def _shard(config: Config, count: ParameterCount) -> int:
    """Parameters in one rank's part of what ZeRO divides: experts among the ranks with the same ones."""
    ranks = partitions(config)
    divided = -(-count.in_experts * config.parallel.expert_parallel_size // ranks)
    return -(-(count.total - count.in_experts) // ranks) + divided


def _optimizer_bytes(config: Config) -> tuple[int, int]:
    """The fp32 weights of this rank's share, and they with the optimizer's state."""
    count, stage = parameters_on_rank(config), config.engine_stage
    optimized = _shard(config, count) if stage >= 1 else count.total
    master = FP32 * optimized if stage >= 1 else 0
    return master, master + _state_bytes(config, count, stage) * optimized // count.total


def _share_of_checkpoint(config: Config) -> int:
    """What a rank writes of a checkpoint: its share of the fp32 weights and of the optimizer's state."""
    count, stage = parameters_on_rank(config), config.engine_stage
    if stage >= 1:
        return _optimizer_bytes(config)[1]
    return -(-(FP32 * count.total + _state_bytes(config, count, stage)) // partitions(config))


def _gathered(config: Config, elsewhere: int) -> int:
    """Bytes of the parameters that stage 3 brings together to be used, of ``elsewhere`` that it could.

    With parameters on NVMe they are copied out of the buffers, and let go of after their use.
    """
    if config.zero.swaps_parameters:
        return max(matrices_on_rank(config)) * element_bytes(config)
    return min(elsewhere, _zero_number(config, "stage3_max_live_parameters")) * element_bytes(config)


def _swap_buffers(config: Config, not_in_update: int) -> dict[str, int]:
    """What NVMe offload holds in main memory: the buffers that the files are read to and written from.

    In the first update the optimizer makes its state outside of them, when ``not_in_update`` bytes are free.
    """
    zero, width = config.zero, element_bytes(config)
    parts: dict[str, int] = {}
    if zero.swaps_optimizer:
        group = FP32 * largest_sub_group(config)
        parts["optimizer buffers"] = optimizer_buffers(config) * group
        parts["first update"] = max(0, 2 * group - not_in_update)
    if zero.swaps_parameters:
        keys = {"buffer_count": PARAMETER_BUFFERS, **swap_keys(config)["offload_param"]}
        writing = largest_sub_group(config) * partitions(config)  # DeepSpeed counts whole parameters here
        buffers = int(keys["buffer_count"]) * int(keys["buffer_size"]) + writing
        parts["parameter buffers"] = buffers * width
    return parts


def _swap_files(config: Config) -> dict[str, int]:
    """What is on NVMe."""
    count, zero = parameters_on_rank(config), config.zero
    shard = _shard(config, count)
    files: dict[str, int] = {}
    if zero.swaps_optimizer:
        files = {"optimizer": _optimizer_bytes(config)[1], "gradients": FP32 * shard}
    if zero.swaps_parameters:
        files["parameters"] = shard * element_bytes(config)
    return files


def _max_in_cpu(config: Config) -> int:
    """Numbers of the parameters that stay in memory though the others are on NVMe."""
    return int(config.zero.block["offload_param"].get("max_in_cpu", LIVE_PARAMETERS))


def _state_bytes(config: Config, count: ParameterCount, stage: int) -> int:
    """Bytes of the whole optimizer state, fp32.

    Adam keeps two moments, SGD with momentum, Lion and Muon one (Muon: of the layers' matrices; it updates
    the rest like Adam), Adafactor one, or next to nothing at stage 0, where it sees rows and columns.
    """
    in_layers = count.layers * count.layer
    per_model = {
        "sgd": FP32 * count.total if config.optimizer.momentum else 0,
        "lion": FP32 * count.total,
        "adafactor": FP32 * count.total if stage else 0,
        "muon": FP32 * in_layers + ADAM_STATE_BYTES * (count.total - in_layers),
    }
    return per_model.get(config.optimizer.type, ADAM_STATE_BYTES * count.total)


def _zero_number(config: Config, key: str) -> int:
    """A number of the ZeRO block, in elements; DeepSpeed's default when it is not given."""
    default = {"stage3_max_live_parameters": LIVE_PARAMETERS, "reduce_bucket_size": BUCKET}[key]
    return int(config.zero.block.get(key, default))


def _bucket_bytes(config: Config, on_gpu: bool) -> int:
    """Gradients on their way between ranks, in buckets of ``reduce_bucket_size``.

    Counted in measured runs: stage 0 flattens a bucket of gradients; stage 1 with 16-bit parameters an fp32
    one, twice; stages 1 and 2 fill a bucket beside the gradients (two with ``overlap_comm``). Stage 3 fills
    one, and makes three fp32 copies to rearrange and scatter it; a matrix that is larger than the bucket goes
    the same way by itself. A GPU allocates the bucket of stages 1 to 3 whole, however small the model.
    """
    stage, width = config.engine_stage, element_bytes(config)
    sends_nothing = stage == 0 or (stage == 1 and config.precision.precision == "bf16")
    if sends_nothing and partitions(config) == 1:
        return 0  # the other engines fill their buckets even so
    elements = _zero_number(config, "reduce_bucket_size")
    used = min(elements, parameters_on_rank(config).total)
    if stage == 1 and width < FP32:
        return 2 * used * FP32
    unused = max(0, elements - used) * width if on_gpu and stage else 0
    if stage == 3:
        return max(used, max(matrices_on_rank(config))) * (width + 3 * FP32) + unused
    return (2 if config.zero.block.get("overlap_comm") else 1) * used * width + unused
