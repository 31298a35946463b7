"""The environment of a machine's ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_lite.planner import Machine
from megatron_lite.utils.log import LOGGER


def rank_environment(machine: Machine, ranks: int, slots: Sequence[int] | None) -> dict[str, str]:
    """This process's environment, for ``ranks`` ranks that share its cores, and the GPUs ``slots``."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # When a rank dies, torch's C++ would fill the screens of the others with warnings about sockets.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not machine.gpus and "OMP_NUM_THREADS" not in environment:
        threads = max(1, machine.cores // ranks)
        environment["OMP_NUM_THREADS"] = str(threads)
        LOGGER.info("%d threads a rank (set OMP_NUM_THREADS to choose)", threads)
    if machine.gpus and slots is not None:
        environment["CUDA_VISIBLE_DEVICES"] = _shown(slots, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return environment


def _shown(slots: Sequence[int], visible: str | None) -> str:
    """``CUDA_VISIBLE_DEVICES`` that leaves only ``slots`` of the GPUs that ``visible`` leaves already."""
    if visible is None:
        return ",".join(str(slot) for slot in slots)
    names = visible.split(",")
    return ",".join(names[slot].strip() for slot in slots)
