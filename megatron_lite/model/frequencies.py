"""The frequencies of the rotation: how far a pair of channels turns from one position to the next.

Pair i of ``size`` rotating channels turns by base^(-2i/size) each position. ``rope_scaling`` changes that for
sequences longer than those of the first training, by one function a ``rope_type``. What they compute is what
transformers' ``modeling_rope_utils`` computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.config.sections.rope import RopeScaling


@dataclass(frozen=True)
class Rope:
    """What the frequencies depend on.

    Attributes:
        size: channels of each head that are turned, ``head_size · rotary_pct``, even.
        base: ``rotary_emb_base``.
        scaling: ``rope_scaling``.
        length: ``seq_length``.
        limit: ``max_position_embeddings``.
    """

    size: int
    base: float
    scaling: RopeScaling
    length: int
    limit: int

    @staticmethod
    def of(config: ModelSection) -> Rope:
        """That of a model."""
        size, base = int(config.head_size * config.rotary_pct), float(config.rotary_emb_base)
        return Rope(size, base, config.rope_scaling, config.seq_length, config.max_position_embeddings)

    @property
    def growth(self) -> float:
        """``factor``, or what it is when it is not given."""
        original = self.scaling.original_max_position_embeddings or self.limit
        return self.scaling.factor or self.limit / original

    def periods(self, device: torch.device) -> torch.Tensor:
        """Unscaled: fp32 [size/2], positions of a turn divided by 2π, 1 / frequency."""
        return self.base ** (torch.arange(0, self.size, 2, dtype=torch.float32, device=device) / self.size)


Frequencies = tuple[torch.Tensor, float]
"""fp32 [size/2], the angle of each pair from one position to the next; and what turned heads are multiplied
by."""


def plain(rope: Rope, device: torch.device) -> Frequencies:
    """Su et al., arXiv 2104.09864. Hugging Face's ``dynamic`` is the same up to ``limit`` positions."""
    return 1.0 / rope.periods(device), 1.0


def linear(rope: Rope, device: torch.device) -> Frequencies:
    """All positions moved closer together (Chen et al., arXiv 2306.15595)."""
    return 1.0 / rope.periods(device) / rope.growth, 1.0


def llama3(rope: Rope, device: torch.device) -> Frequencies:
    """Slow pairs are slowed down, fast ones stay, smoothly between (Llama 3.1, arXiv 2407.21783)."""
    scaling, frequency = rope.scaling, 1.0 / rope.periods(device)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert original is not None
    assert low is not None
    assert high is not None
    turns = original * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / rope.growth), 1.0


def yarn(rope: Rope, device: torch.device) -> Frequencies:
    """The same by pair instead of by turn, and sharper attention (Peng et al., arXiv 2309.00071)."""
    scaling, frequency = rope.scaling, 1.0 / rope.periods(device)
    original = scaling.original_max_position_embeddings
    assert original is not None

    def pair_with(turns: float) -> float:
        """The (broken) number of the pair that turns so often in an original sequence."""
        return rope.size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    first, last = pair_with(scaling.beta_fast or 32.0), pair_with(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.size - 1)
    pairs = torch.arange(rope.size // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / rope.growth), scaling.attention_factor or _yarn_factor(rope)


def _yarn_factor(rope: Rope) -> float:
    """0.1 ln(factor) + 1; with both ``mscale`` the quotient of two such."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.growth) + 1.0

    scaling = rope.scaling
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def longrope(rope: Rope, device: torch.device) -> Frequencies:
    """A divisor for each pair, found by search (Ding et al., arXiv 2402.13753).

    ``long_factor`` for a model whose ``seq_length`` is longer than before, else ``short_factor``: for all its
    sequences, where Hugging Face looks at the length of each. So a cache of turned keys stays right, and
    neither the batch nor the room for a text changes what is written.
    """
    scaling = rope.scaling
    original = scaling.original_max_position_embeddings
    assert original is not None
    divisors = scaling.long_factor if rope.length > original else scaling.short_factor
    factor = scaling.attention_factor
    if factor is None:
        factor = math.sqrt(1 + math.log(rope.growth) / math.log(original)) if rope.growth > 1 else 1.0
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device=device) * rope.periods(device)), factor


ROPE_TYPES: dict[str, Callable[[Rope, torch.device], Frequencies]] = {
    "default": plain,
    "dynamic": plain,
    "linear": linear,
    "llama3": llama3,
    "longrope": longrope,
    "yarn": yarn,
}
"""``rope_type`` → its frequencies. To add one: a line here, and what it needs in ``RopeScaling``."""


def frequencies(rope: Rope, device: torch.device) -> Frequencies:
    """The frequencies of a model's rotation."""
    return ROPE_TYPES[rope.scaling.rope_type](rope, device)
