"""Peak FLOP/s from the table, from a measurement, from the key; memory in use."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from megatron_lite.metrics.device import memory_in_use, peak_flops, table_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [  # names as the drivers write them; TFLOP/s from the makers' data sheets
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 67.0),
        ("NVIDIA H100 PCIe", 756.5, 51.0),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200", 989.4, 67.0),
        ("NVIDIA B200", 2250.0, 75.0),
        ("Tesla V100-SXM2-16GB", 125.0, 15.7),
        ("Tesla V100-PCIE-32GB", 112.0, 14.0),
        ("Tesla T4", 65.0, 8.1),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA A10G", 70.0, 31.5),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40", 181.05, 90.5),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA GeForce RTX 3090", 71.0, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("AMD Instinct MI250X", 191.5, 23.9),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_table(name: str, half: float, single: float) -> None:
    assert table_flops(name, torch.bfloat16) == half * 1e12
    assert table_flops(name, torch.float16) == half * 1e12
    assert table_flops(name, torch.float32) == single * 1e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Quadro P4000", "NVIDIA RTX A1000"],
)
def test_other_devices_are_not_taken_for_known_ones(name: str) -> None:
    assert table_flops(name, torch.bfloat16) is None


def test_the_key_wins() -> None:
    assert peak_flops(CPU, torch.float32, 12.5) == 12.5e12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_once_and_quickly(dtype: torch.dtype) -> None:
    start = time.thread_time()  # not the time that a busy machine lets us wait
    peak = peak_flops(CPU, dtype)
    assert time.thread_time() - start < 5  # 0.3 s
    start = time.thread_time()
    assert peak_flops(CPU, dtype) == peak
    assert time.thread_time() - start < 0.01


def test_the_measurement_is_what_another_library_reaches() -> None:
    size, best = 768, float("inf")
    matrix = np.full((size, size), 0.5, np.float32)
    for _ in range(20):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    # The same hardware through another BLAS, with other threads and neighbours: the order of magnitude.
    assert 0.1 < peak_flops(CPU, torch.float32) / (2 * size**3 / best) < 10


def test_memory_in_use_grows_with_what_is_held() -> None:
    before = memory_in_use(CPU)
    block = torch.ones(64 * 2**20 // 4)
    grown = memory_in_use(CPU) - before
    assert block[0] == 1
    assert 48 * 2**20 < grown < 256 * 2**20
