"""How much memory one rank needs, part by part, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config import Config
from megatron_lite.planner.activations import activation_bytes, logits_bytes
from megatron_lite.planner.parameters import ParameterCount, parameters_by_place

STATE_BYTES = {"adafactor": 0, "sgd": 4, "lion": 4, "adagrad": 4, "muon": 4}
"""Optimizer state per parameter, bytes: what is not named here keeps two fp32 moments like Adam. Adafactor's
row and column sums are too small to count; Muon keeps one moment of each matrix of the layers."""

ADAM_STATE_BYTES = 8
MASTER_BYTES = 4
RUNTIME_BYTES = {"cpu": 700 << 20, "gpu": 1 << 30}
"""What a rank takes before it has a model: Python, torch and DeepSpeed on a CPU (measured: 0.6–0.7 GB); the CUDA
context, NCCL's buffers and workspace of cuBLAS on a GPU."""

GPU_HOST_BYTES = 3 << 30
"""Main memory of a rank that computes on a GPU (CUDA's libraries included)."""

LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``."""

BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in elements."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one rank in bytes.

    Attributes:
        device: by part, in the memory of the device the rank computes on (main memory on a CPU).
        host: by part, in main memory because it is offloaded there.
    """

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_total(self) -> int:
        """Bytes on the computing device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes offloaded to main memory."""
        return sum(self.host.values())


def estimate_memory(config: Config, on_gpu: bool = False) -> MemoryEstimate:
    """The peak memory of one rank of ``config``'s run. ``vocab_size`` must be known.

    The model states follow ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3) with what DeepSpeed
    keeps on top: an fp32 copy of the gradients during the update, buckets of gradients on their way, and at
    stage 3 the parameters gathered for use. Activations follow :mod:`megatron_lite.planner.activations`.
    """
    device, host = _model_states(config)
    device["activations"] = activation_bytes(config, on_gpu)
    device["logits"] = logits_bytes(config)
    device["communication"] = _bucket_bytes(config, on_gpu)
    device["runtime"] = RUNTIME_BYTES["gpu" if on_gpu else "cpu"]
    # The update starts when activations and logits are gone: only the larger of the two counts.
    update = device.pop("update")
    device["update"] = max(0, update - device["activations"] - device["logits"])
    if on_gpu:
        host["runtime"] = GPU_HOST_BYTES
    return MemoryEstimate(device, host)


def _state_bytes(config: Config, count: ParameterCount) -> int:
    """Bytes of the whole optimizer state, fp32."""
    kind = config.optimizer.type.lower()
    per_parameter = STATE_BYTES.get(kind, ADAM_STATE_BYTES)
    if kind == "sgd" and not config.optimizer.momentum:
        return 0
    if kind == "muon":
        in_layers = count.layers * count.layer
        return per_parameter * in_layers + ADAM_STATE_BYTES * (count.total - in_layers)
    return per_parameter * count.total


def _model_states(config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters, gradients, optimizer and the update's temporary copy: on the device and on the host."""
    count = parameters_by_place(config)
    stage, ranks = config.zero.stage, config.parallel.data_parallel_size
    width = parameter_bytes(config)
    shard = -(-count.total // ranks)
    held = shard if stage >= 3 else count.total
    gradients = (shard if stage >= 2 else count.total) * width
    optimized = shard if stage >= 1 else count.total
    # Stage 0 in fp32 updates the parameters themselves; every other engine updates an fp32 copy.
    has_master = stage >= 1 or width < MASTER_BYTES
    optimizer = _state_bytes(config, count) * optimized // count.total + has_master * MASTER_BYTES * optimized
    update = has_master * MASTER_BYTES * optimized
    device = {"parameters": held * width, "gradients": gradients, "optimizer": optimizer, "update": update}
    host: dict[str, int] = {}
    if stage >= 3 and ranks > 1:
        device["gathered parameters"] = (
            min(count.total - shard, _zero_number(config, "stage3_max_live_parameters", LIVE_PARAMETERS))
            * width
        )
    if config.zero.offload_optimizer != "none":
        device["optimizer"] = device["update"] = 0
        if config.zero.offload_optimizer == "cpu":
            host["optimizer"] = optimizer
            host["gradients"] = (MASTER_BYTES + width) * optimized
    if config.zero.offload_param != "none":
        device["parameters"] = 0
        if config.zero.offload_param == "cpu":
            host["parameters"] = held * width
    return device, host


def _zero_number(config: Config, key: str, default: int) -> int:
    value = config.zero.zero_optimization.get(key, default)
    return default if isinstance(value, str) else int(value)


def parameter_bytes(config: Config) -> int:
    """Bytes of one parameter as the model computes with it."""
    return 4 if config.precision.precision == "fp32" else 2


def _bucket_bytes(config: Config, on_gpu: bool) -> int:
    """Buckets in which gradients travel. A GPU allocates them whole; of main memory only what is used counts."""
    if config.zero.stage == 0:
        return 0
    total = parameters_by_place(config).total
    elements = _zero_number(config, "reduce_bucket_size", BUCKET)
    buffers = 2 if config.zero.zero_optimization.get("overlap_comm") else 1
    return buffers * (elements if on_gpu else min(elements, total)) * parameter_bytes(config)
