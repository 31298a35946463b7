"""What this machine has: cores, memory, GPUs. Asks the operating system and ``nvidia-smi``, not torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

CGROUP_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number around 2**63; anything as large as this is none."""

NVIDIA_SMI_SECONDS = 20
"""How long ``nvidia-smi`` may take; without a persistence daemon its first call takes seconds."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as its driver calls it.
        memory_total: bytes.
        memory_free: bytes that no process uses now.
    """

    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True)
class Machine:
    """One machine as this process may use it.

    Attributes:
        cores: logical cores this process may run on.
        memory_total: bytes of main memory, or the control group's limit if that is less.
        memory_available: bytes that can be had without swapping.
        gpus: the visible GPUs, in the order of their local ranks.
    """

    cores: int
    memory_total: int
    memory_available: int
    gpus: tuple[Gpu, ...] = ()


def this_machine() -> Machine:
    """The machine this process runs on."""
    total, available = available_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
    return Machine(_cores(), total, available, visible_gpus(total, available))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(meminfo: Path, cgroup: Path) -> tuple[int, int]:
    """Bytes of main memory (in all, available), within the limit of this process's control group.

    Source: proc(5) for ``MemAvailable``; the kernel's cgroup-v1/memory and cgroup-v2 pages. File pages of the
    group are not counted as used: the kernel takes them back under pressure.
    """
    if not meminfo.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    fields = _numbers(meminfo)
    total, available = fields["MemTotal:"] * 1024, fields["MemAvailable:"] * 1024
    for limit_file, usage_file, file_pages in (
        (cgroup / "memory.max", cgroup / "memory.current", "file"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes", "total_cache"),
    ):
        limit = _number(limit_file)
        if limit is not None and limit < CGROUP_UNLIMITED:
            pages = _numbers(limit_file.with_name("memory.stat")).get(file_pages, 0)
            used = max(0, (_number(usage_file) or 0) - pages)
            total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _numbers(path: Path) -> dict[str, int]:
    """The ``name number`` lines of ``path``; empty when there is no such file."""
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number that ``path`` holds; None without one ("max") and without the file."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def visible_gpus(main_total: int, main_available: int) -> tuple[Gpu, ...]:
    """The GPUs that ``nvidia-smi`` lists and ``CUDA_VISIBLE_DEVICES`` leaves visible; none without a driver.

    ``main_total`` and ``main_available`` are bytes of main memory, for GPUs that have no memory of their own.
    Costs one call of ``nvidia-smi`` (0.1 to 2 s) on a machine with GPUs, nothing on others.
    """
    command = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.free",
        "--format=csv,noheader,nounits",
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(run.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"), main_total, main_available)


def parse_gpus(listing: str, visible: str | None, main_total: int, main_available: int) -> tuple[Gpu, ...]:
    """The GPUs of ``nvidia-smi``'s CSV ``listing`` that ``visible`` names (indices or UUIDs), in its order.

    Like CUDA, ends at the first entry that names no GPU. Memory is listed in MiB, or as ``[N/A]`` by a GPU
    that shares main memory (GB10, Jetson): then it is main memory's, in bytes.
    """
    by_name: dict[str, Gpu] = {}
    order: list[str] = []
    for line in listing.strip().splitlines():
        index, uuid, name, total, free = (field.strip() for field in line.split(","))
        gpu = Gpu(name, _bytes(total, main_total), _bytes(free, main_available))
        by_name[index] = by_name[uuid] = gpu
        order.append(index)
    gpus: list[Gpu] = []
    for name in order if visible is None else visible.split(","):
        if name.strip() not in by_name:
            break
        gpus.append(by_name[name.strip()])
    return tuple(gpus)


def _bytes(mebibytes: str, otherwise: int) -> int:
    return int(mebibytes) << 20 if mebibytes.isdigit() else otherwise
