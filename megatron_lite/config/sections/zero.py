"""Keys of ZeRO: how optimizer state, gradients and parameters are shared."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from megatron_lite.config.fields import Block, Section


class ZeroBlock(Section):
    """DeepSpeed's `zero_optimization` block. Its other names are handed to DeepSpeed as they are."""

    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Block | None = None
    """`{device: cpu}` keeps the optimizer state in the machine's memory."""
    offload_param: Block | None = None
    """`{device: cpu}` keeps the parameters there too (stage 3)."""


class ZeroSection(Section):
    """ZeRO."""

    zero_optimization: ZeroBlock = ZeroBlock()
    """ZeRO's stage and settings."""

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return self.zero_optimization.stage

    @property
    def offload_optimizer(self) -> bool:
        """Whether the optimizer state leaves the device."""
        return _leaves(self.zero_optimization.offload_optimizer)

    @property
    def offload_param(self) -> bool:
        """Whether the parameters leave the device."""
        return _leaves(self.zero_optimization.offload_param)

    @property
    def block(self) -> dict[str, Any]:
        """The whole block, for DeepSpeed."""
        return self.zero_optimization.model_dump(mode="json", exclude_none=True)


def _leaves(block: Block | None) -> bool:
    return block is not None and block.get("device", "none") != "none"
