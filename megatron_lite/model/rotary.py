"""Rotary position embedding (Su et al., arXiv 2104.09864), GPT-NeoX's half-rotation convention.

Of each head's first ``size`` channels, channel i < size/2 and channel i + size/2 form a pair, turned by the
angle position · base^(-2i/size), or as ``rope_scaling`` says; the other channels pass through.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from megatron_lite.model.frequencies import Rope, frequencies

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places

Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [s, 1, 1, size/2] or [b, s, 1, 1, size/2], in the dtype of the heads they turn."""


@lru_cache(maxsize=32)
def rotary_table(
    rope: Rope, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, size/2] of the angles of positions 0 … length - 1.

    Computed in fp32 and rounded once to ``dtype``, as GPT-NeoX and Hugging Face do; kept for the next call.
    Where ``rope_scaling`` multiplies the turned heads, both are multiplied.
    """
    # A table made while generating must still serve training: not an inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        turn, factor = frequencies(rope, device)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), turn)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype), sin.to(dtype)


def cos_and_sin(
    rope: Rope,
    length: int,
    cache: KVCache | None,
    places: Places | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [s, size/2] or [b, s, size/2], of ``length`` positions that follow those in ``cache``."""
    start = cache.length if cache else 0
    end = start + length
    place: slice | torch.Tensor = slice(start, end)
    if places is not None and places.positions is not None:
        end, place = places.length, places.positions
    elif cache is not None and cache.starts is not None:
        place = cache.positions
    # A power of two: generation, whose length grows by one, rebuilds the table rarely.
    cos, sin = rotary_table(rope, 1 << (end - 1).bit_length(), device, dtype)
    return cos[place], sin[place]


class Rotary:
    """The rotation of a model's heads, looked up by position.

    Attributes:
        rope: what its frequencies depend on.
    """

    def __init__(self, config: ModelSection) -> None:
        self.rope = Rope.of(config)

    def rotation(
        self, x: torch.Tensor, length: int, cache: KVCache | None, places: Places | None
    ) -> Rotation:
        """The rotation for ``length`` positions, which follow those in ``cache``, in ``x``'s dtype."""
        cos, sin = cos_and_sin(self.rope, length, cache, places, x.device, x.dtype)
        return cos[..., None, None, :], sin[..., None, None, :]


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn heads: ``x [b, s, groups, heads, d]`` (any strides) → ``[b, groups, heads, s, d]``."""
    if torch.compiler.is_compiling():
        return _rotate_plainly(x, *rotation).permute(0, 2, 3, 1, 4)
    return _Rotate.apply(x, *rotation)


def _rotate_plainly(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The textbook form, which a compiler fuses; it cannot trace the one below."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotation and transposition to the kernels' layout in one pass over memory.

    Written by hand because the textbook form, run eagerly, costs several passes and temporaries in each
    direction. The backward of a rotation is the rotation by the opposite angle.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        batch, length, groups, heads, size = x.shape
        out = x.new_empty(batch, groups, heads, length, size)
        _turn(x, cos, sin, 1, out.permute(0, 3, 1, 2, 4))
        return out

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        batch, groups, heads, length, size = gradient.shape
        out = gradient.new_empty(batch, length, groups, heads, size)
        _turn(gradient.permute(0, 3, 1, 2, 4), cos, sin, -1, out)
        return out, None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int, out: torch.Tensor) -> None:
    """Write ``x`` turned by ``sign`` times the angle into ``out`` (same shape, any strides)."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    out_first, out_second, out_rest = out.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    if rest.shape[-1]:
        out_rest.copy_(rest)
