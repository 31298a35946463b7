"""Reading a checkpoint into an engine of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lite.parallel.context import ParallelContext


def load_checkpoint(
    path: Path, engine: Any, context: ParallelContext, load_optimizer: bool = True, load_rng: bool = True
) -> dict[str, Any]:
    """Fill ``engine`` from the checkpoint ``path``; called by every rank; the trainer's state is returned."""
    raise AssertionError("being written")
