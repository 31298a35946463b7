"""What the installed torch was built for, without the seconds that importing it takes."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from megatron_lite.planner import Machine
from megatron_lite.utils.log import LOGGER


def usable(machine: Machine) -> Machine:
    """``machine`` as the installed torch can use it: without GPUs, and with a warning, if it has no CUDA."""
    version = _version_file()
    if not machine.gpus or version is None or has_gpus(version):
        return machine
    LOGGER.warning(
        "the installed torch is built for CPUs only: the %d GPUs of this machine stay unused. "
        "Install a torch built for CUDA (requirements-gpu.txt) to train on them.",
        len(machine.gpus),
    )
    return replace(machine, gpus=())


def has_gpus(version: str) -> bool:
    """Whether torch was built for CUDA or ROCm, by the text of its ``version.py``.

    >>> has_gpus("cuda: Optional[str] = None\\nhip: Optional[str] = None")
    False
    >>> has_gpus("cuda: Optional[str] = '12.8'")
    True
    """
    return re.search(r"^(cuda|hip)\b[^=]*=\s*['\"]", version, re.MULTILINE) is not None


def _version_file() -> str | None:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    return path.read_text() if path.exists() else None
