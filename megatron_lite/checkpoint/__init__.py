"""Floor 4: the state of a run on disk and back, under any ZeRO stage and number of ranks.

A checkpoint is a folder of safetensors files and one JSON index, with no pickle. ``docs/checkpoints.md``
tells the format and its promises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lite.checkpoint.folder import find_checkpoint
from megatron_lite.checkpoint.read import read_config, read_weights

if TYPE_CHECKING:
    from megatron_lite.checkpoint.load import load_checkpoint
    from megatron_lite.checkpoint.save import save_checkpoint
    from megatron_lite.checkpoint.verification import verify

__all__ = ["find_checkpoint", "load_checkpoint", "read_config", "read_weights", "save_checkpoint", "verify"]


def __getattr__(name: str) -> object:
    # What needs an engine or the model is imported only when somebody asks for it: reading weights (export,
    # generation) must start fast.
    if name == "save_checkpoint":
        from megatron_lite.checkpoint.save import save_checkpoint

        return save_checkpoint
    if name == "load_checkpoint":
        from megatron_lite.checkpoint.load import load_checkpoint

        return load_checkpoint
    if name == "verify":
        from megatron_lite.checkpoint.verification import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
