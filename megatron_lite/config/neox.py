"""GPT-NeoX's other keys: second names, keys that lost their purpose, and features that are not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALIASES = {
    "gas": "gradient_accumulation_steps",
    "batch_size": "train_micro_batch_size_per_gpu",
    "save_interval": "checkpoint_factor",
    "clip_grad": "gradient_clipping",
    "lr": "optimizer.params.lr",
    "optimizer_type": "optimizer.type",
    "zero_stage": "zero_optimization.stage",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "loss_scale": "fp16.loss_scale",
    "loss_scale_window": "fp16.loss_scale_window",
    "hysteresis": "fp16.hysteresis",
    "min_scale": "fp16.min_loss_scale",
}
"""Second names of keys."""


@dataclass(frozen=True)
class Unused:
    """A key without effect here: ``why``, and the ``neutral`` values that ask for nothing, about which it is
    silent."""

    why: str
    neutral: tuple[Any, ...] = (None, False)

    def is_neutral(self, value: Any) -> bool:
        """Whether ``value`` asks for nothing."""
        return value is None or value in self.neutral


RETIRED: dict[str, Unused] = {}
"""Keys that are accepted and do nothing."""

REFUSED: dict[str, Unused] = {}
"""Keys of features that are not there."""
