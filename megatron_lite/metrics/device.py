"""Facts about the device: how fast it could be, how much memory is in use."""

from __future__ import annotations

import re
import time
from functools import lru_cache

import psutil
import torch

MEASURE_SECONDS = 0.2

GPU_TFLOPS: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250.0, 75.0),
    (r"H200 NVL", 835.5, 60.0),
    (r"H200|GH200", 989.4, 67.0),
    (r"H100 NVL", 835.5, 60.0),
    (r"H100 PCIe", 756.5, 51.0),
    (r"H100", 989.4, 67.0),
    (r"A100", 312.0, 19.5),
    (r"A40", 149.7, 37.4),
    (r"A10G", 70.0, 31.5),
    (r"A10", 125.0, 31.2),
    (r"L40S", 362.05, 91.6),
    (r"L40", 181.05, 90.5),
    (r"L4", 121.0, 30.3),
    (r"V100S", 130.0, 16.4),
    (r"V100[- ]PCIE", 112.0, 14.0),
    (r"V100", 125.0, 15.7),
    (r"T4", 65.0, 8.1),
    (r"RTX A6000", 154.8, 38.7),
    (r"RTX 6000 Ada", 364.2, 91.1),
    (r"RTX 5090(?! (?:D|Laptop))", 209.5, 104.8),
    (r"RTX 4090(?! (?:D|Laptop))", 165.2, 82.6),
    (r"RTX 3090 Ti", 80.0, 40.0),
    (r"RTX 3090", 71.0, 35.6),
    (r"MI250X", 191.5, 23.9),
    (r"MI250|MI210", 181.0, 22.6),
    (r"MI300X|MI325X", 1307.4, 163.4),
)
"""Pattern in the device's name → dense TFLOP/s of one device in (bf16 or fp16, fp32 without TF32).

Without structured sparsity, with accumulation in fp32. The first pattern that matches counts. Sources: the
makers' data sheets and white papers (NVIDIA HGX B200, H200, H100, A100, V100, L4, L40, L40S, A10, A40 and T4
data sheets; GA102, Ada and Blackwell RTX white papers, which list half precision with fp32 accumulation; AMD
Instinct MI200 and MI300 data sheets). torch sees each of the two dies of an MI250 as a device, so its row is
half of the card's figure.
"""


def table_flops(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s in ``dtype`` of the GPU called ``name`` by its driver; None when the table does not know it."""
    for pattern, half, single in GPU_TFLOPS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", name):
            return (single if dtype == torch.float32 else half) * 1e12
    return None


def peak_flops(device: torch.device, dtype: torch.dtype, override: float | None = None) -> float:
    """Peak FLOP/s of one ``device`` when it multiplies matrices in ``dtype``.

    ``override`` (the key ``peak_theoretical_tflops``, in TFLOP/s) wins; else the table of GPUs; else, on a
    CPU or an unknown device, what a matmul of this process reaches, measured once (0.3 s at most). The
    measurement uses this process's threads: with several ranks on one CPU it is right when they share the
    cores among them.
    """
    if override is not None:
        return override * 1e12
    if device.type == "cuda":
        known = table_flops(torch.cuda.get_device_name(device), dtype)
        if known is not None:
            return known
    return _measured_flops(device, dtype)


@lru_cache
def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of the square matmuls that fit into :data:`MEASURE_SECONDS`."""
    size = 8192 if device.type == "cuda" else 768
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + MEASURE_SECONDS
    while True:
        start = time.perf_counter()
        left @ left
        _synchronize(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int:
    """Bytes: on CUDA the most that torch's allocator held so far, elsewhere the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
