"""Floor 3: from a checked configuration to running ranks, on this machine or on several. No torch."""

from megatron_lite.launcher.command import main

__all__ = ["main"]
