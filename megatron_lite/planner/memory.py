"""How much memory one rank needs, part by part, by formula."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_lite.config import Config
from megatron_lite.planner.activations import activation_bytes, element_bytes, logits_bytes
from megatron_lite.planner.parameters import ParameterCount, parameters_on_rank

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
"""DeepSpeed's default of ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``."""

BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in elements."""


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
    device, host = _model_states(config)
    device["activations"] = activation_bytes(config, on_gpu)
    device["logits"] = logits_bytes(config, on_gpu)
    device["communication"] = _bucket_bytes(config, on_gpu)
    device["runtime"] = GPU_RUNTIME_BYTES if on_gpu else CPU_RUNTIME_BYTES
    # The update starts when activations and logits are gone: only the larger of the two counts.
    device["update"] = max(0, device["update"] - device["activations"] - device["logits"])
    if on_gpu:
        host["runtime"] = GPU_HOST_BYTES
        if config.zero.stage < 3:
            host["model while it is built"] = parameters_on_rank(config).total * element_bytes(config)
    return MemoryEstimate(_without_zeros(device), _without_zeros(host))


def _without_zeros(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size}


def _stage(config: Config) -> int:
    """ZeRO's stage as it runs: the engine runs stage 0 with 16-bit parameters as stage 1."""
    return config.zero.stage or (0 if config.precision.precision == "fp32" else 1)


def _model_states(config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters, gradients, optimizer and the update's temporary copy: on the device and on the host."""
    count = parameters_on_rank(config)
    stage, width = _stage(config), element_bytes(config)
    shard = -(-count.total // config.parallel.replicas)
    held = shard if stage >= 3 else count.total
    optimized = shard if stage >= 1 else count.total
    # Stage 0 updates the parameters themselves; the other stages update an fp32 copy.
    master = FP32 * optimized if stage >= 1 else 0
    optimizer = master + _state_bytes(config, count, stage) * optimized // count.total
    live = _zero_number(config, "stage3_max_live_parameters")
    device = {
        "parameters": held * width,
        "gathered parameters": min(count.total - held, live) * width,
        "gradients": (shard if stage >= 2 else count.total) * FP32,
        "optimizer": optimizer,
        "update": master,
    }
    host: dict[str, int] = {}
    if config.zero.offload_optimizer:
        device["optimizer"] = device["update"] = 0
        if _offload_device(config, "offload_optimizer") == "cpu":
            # The gradients' fp32 copy, and the new parameters on their way back.
            host = {"optimizer": optimizer, "gradients": FP32 * optimized, "update": width * optimized}
    if config.zero.offload_param:
        device["parameters"] = 0
        if _offload_device(config, "offload_param") == "cpu":
            host["parameters"] = held * width
    return device, host


def _offload_device(config: Config, block: str) -> str:
    """Where ``block`` of the ZeRO settings offloads to: "cpu" or "nvme"."""
    return str(config.zero.block[block]["device"])


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
    """A number of the ZeRO block, in elements; DeepSpeed's default when it is not given (or "auto")."""
    default = {"stage3_max_live_parameters": LIVE_PARAMETERS, "reduce_bucket_size": BUCKET}[key]
    value = config.zero.block.get(key, default)
    return int(value) if isinstance(value, int | float) else default


def _bucket_bytes(config: Config, on_gpu: bool) -> int:
    """Gradients on their way between ranks, in buckets of ``reduce_bucket_size``.

    Counted in measured runs: stage 0 flattens a bucket of gradients; stage 1 with 16-bit parameters an fp32
    one, twice; stages 1 and 2 fill a bucket beside the gradients (two with ``overlap_comm``); stage 3
    rearranges and scatters it as well. A GPU allocates the bucket of stages 1 to 3 whole, however small the
    model.
    """
    stage, width = _stage(config), element_bytes(config)
    sends_nothing = stage == 0 or (stage == 1 and config.precision.precision == "bf16")
    if sends_nothing and config.parallel.replicas == 1:
        return 0  # the other engines fill their buckets even so
    elements = _zero_number(config, "reduce_bucket_size")
    used = min(elements, parameters_on_rank(config).total)
    buckets = 4 if stage == 3 else 2 if config.zero.block.get("overlap_comm") else 1
    if stage == 1 and width < FP32:
        return 2 * used * FP32
    return buckets * used * width + (max(0, elements - used) * width if on_gpu and stage else 0)
