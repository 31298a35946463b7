"""Logging that speaks once, not once a rank."""

from __future__ import annotations

import logging
import os
import sys

LOGGER = logging.getLogger("megatron_lite")


def rank_from_environment() -> int:
    """This process's global rank (0 when no launcher set one)."""
    return int(os.environ.get("RANK", 0))


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to standard error: everything from rank 0, warnings from the other ranks."""
    rank = rank_from_environment()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(level if rank == 0 else logging.WARNING)
