"""Keys of the learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.fields import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    derived,
)


class ScheduleSection(Section):
    """How the learning rate moves."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse_sqrt", "noam", "wsd"] = "linear"
    """Shape after warm-up. `noam` is another name of `inverse_sqrt`; `wsd` stays constant and decays at the
    end."""
    lr_decay_fraction: PositiveFloat = 1.0
    """`lr_decay_iters` as a part of `train_iters`, when `lr_decay_iters` is not given."""
    lr_decay_iters: NonNegative = derived("lr_decay_fraction x train_iters")
    """Step at which the learning rate has reached `min_lr`."""
    min_lr: NonNegativeFloat = 0.0
    """Smallest learning rate after warm-up."""
    warmup: Probability = 0.01
    """Length of the warm-up as a part of `lr_decay_iters`."""
    warmup_iters: NonNegative | None = None
    """Length of the warm-up in steps, instead of `warmup`."""
    warmup_tokens: Positive | None = None
    """Length of the warm-up in tokens, instead of `warmup`."""
    wsd_decay_iters: NonNegative = derived("a tenth of lr_decay_iters")
    """Length of the final decay of `wsd` in steps, ending at `lr_decay_iters`."""
    wsd_decay_style: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the final decay of `wsd`: `sqrt` is 1 - sqrt(progress)."""

    @property
    def warmup_steps(self) -> int | None:
        """Length of the warm-up in steps; None when it is counted in tokens."""
        if self.warmup_tokens is not None:
            return None
        return int(self.warmup * self.lr_decay_iters) if self.warmup_iters is None else self.warmup_iters

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate has reached `min_lr`."""
        return self.lr_decay_iters
