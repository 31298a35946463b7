"""Where figures go besides the terminal. A back end only ever gets a step number and floats.

A new back end is one function in one file and one line in :data:`BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from megatron_lite.config import Config
from megatron_lite.metrics.jsonl import open_jsonl
from megatron_lite.metrics.tensorboard import open_tensorboard
from megatron_lite.metrics.wandb import open_wandb
from megatron_lite.utils.log import rank_from_environment


class Backend(Protocol):
    """Receives figures."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` (by name) as the figures of ``step``."""

    def close(self) -> None:
        """Write out what is pending. Nothing is logged afterwards."""


BACKENDS: dict[str, Callable[[Config, Path], Backend | None]] = {
    "jsonl": open_jsonl,
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
}
"""By name: opens the back end for a run, or returns None when the configuration does not ask for it."""


def open_backends(config: Config, run_dir: Path) -> list[Backend]:
    """The back ends that ``config`` asks for, writing below ``run_dir``; none on a rank other than 0.

    Raises:
        ConfigError: a back end that was asked for cannot be opened.
    """
    if rank_from_environment() != 0:
        return []
    opened = (open_backend(config, run_dir) for open_backend in BACKENDS.values())
    return [backend for backend in opened if backend is not None]
