"""What the machine has, read from listings written down here."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.planner import this_machine
from megatron_lite.planner.machine import available_memory, parse_gpus

MEMINFO = (
    "MemTotal:       16000 kB\nMemFree:         2000 kB\nMemAvailable:    9000 kB\nHugePages_Total:   0\n"
)
LISTING = """0, GPU-aa, NVIDIA A100-SXM4-40GB, 40960, 40000
1, GPU-bb, NVIDIA A100-SXM4-40GB, 40960, 512
2, GPU-cc, NVIDIA A100-SXM4-40GB, 40960, 40960
"""


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO)
    return path


def cgroup_files(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_without_a_control_group(meminfo: Path, tmp_path: Path) -> None:
    assert available_memory(meminfo, tmp_path / "none") == (16000 << 10, 9000 << 10)


def test_unlimited_group(meminfo: Path, tmp_path: Path) -> None:
    cgroup_files(tmp_path, memory__max="max\n", memory__current="4096\n")
    assert available_memory(meminfo, tmp_path) == (16000 << 10, 9000 << 10)


def test_limited_group_counts_file_pages_as_free(meminfo: Path, tmp_path: Path) -> None:
    cgroup_files(
        tmp_path, memory__max="4096000", memory__current="3000000", memory__stat="file 1000000\nanon 5\n"
    )
    assert available_memory(meminfo, tmp_path) == (4096000, 4096000 - 2000000)


def test_version_1_group(meminfo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    names = {"memory__limit_in_bytes": "8192000", "memory__usage_in_bytes": "8000000"}
    cgroup_files(folder, **names, memory__stat="total_cache 500000\n")
    assert available_memory(meminfo, tmp_path) == (8192000, 8192000 - 7500000)
    cgroup_files(folder, memory__limit_in_bytes=str(2**63 - 4096))
    assert available_memory(meminfo, tmp_path) == (16000 << 10, 9000 << 10)


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert 0 < machine.memory_available <= machine.memory_total


def test_all_gpus() -> None:
    gpus = parse_gpus(LISTING, None, 1, 1)
    assert [gpu.memory_free >> 20 for gpu in gpus] == [40000, 512, 40960]
    assert gpus[0].name == "NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("visible", "free"),
    [("2,0", [40960, 40000]), ("GPU-bb", [512]), ("", []), ("-1", []), ("0,7,1", [40000])],
)
def test_visible_gpus(visible: str, free: list[int]) -> None:
    assert [gpu.memory_free >> 20 for gpu in parse_gpus(LISTING, visible, 1, 1)] == free


def test_gpus_that_share_main_memory() -> None:
    (gpu,) = parse_gpus("0, GPU-dd, NVIDIA GB10, [N/A], [N/A]\n", None, 128 << 30, 100 << 30)
    assert (gpu.name, gpu.memory_total, gpu.memory_free) == ("NVIDIA GB10", 128 << 30, 100 << 30)
