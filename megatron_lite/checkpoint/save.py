"""Writing a checkpoint: every rank its own part, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lite.parallel.context import ParallelContext


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Any,
    trainer_state: dict[str, Any],
    config_keys: dict[str, Any],
    context: ParallelContext,
    keep_last: int | None = None,
) -> Path:
    """Write ``folder/global_step{step}`` and let ``latest`` name it; called by every rank."""
    raise AssertionError("being written")
