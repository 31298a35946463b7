"""Attention kernels: the portable one and the fast one, chosen by what is present.

A kernel computes softmax(scale · q kᵀ) v, with the scale 1 / √d unless it is given, and grouped-query
attention: ``q [b, heads, s, d]``, ``k`` and ``v [b, kv_heads, s, d]`` with any strides but a contiguous last
dimension → [b, heads, s, d]. Query head i reads the key head i // (heads / kv_heads). A ``causal`` query sees
the keys up to its own, any other all of them; with a ``window`` those less than so many places away; with
``documents`` those of its own document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from megatron_lite.model.places import Documents
from megatron_lite.model.tile_kernels import CUDA_FLASH, flash_knows, tile_kernel
from megatron_lite.model.tiled import tiled_attention
from megatron_lite.utils.errors import ConfigError

Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, bool, int | None, Documents | None, float | None],
    torch.Tensor,
]
"""(q, k, v, dropout probability, causal, window, documents, scale) → output."""


@dataclass(frozen=True)
class AttentionKernel:
    """One implementation of attention.

    Attributes:
        run: what computes it.
        serves: (device, dtype, width of a head) → whether it can run there.
        needs: what it asks for, for the error message.
    """

    run: Run
    serves: Callable[[torch.device, torch.dtype, int], bool]
    needs: str


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    causal: bool,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention over whole sequences, or its kernels.

    These go tile by tile, but take all documents at once on CUDA, unless there is dropout: torch's function
    for that has none.
    """
    if window is None and documents is None:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if documents is not None and not dropout and tile_kernel(q, dropout) is CUDA_FLASH:
        left = -1 if window is None else window - 1
        run = partial(varlen_attn, scale=scale, window_size=(left, 0 if causal else left), enable_gqa=True)
        return _end_to_end(run, q, k, v, documents)
    return tiled_attention(q, k, v, dropout, causal, window, documents, scale)


def masked_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """``q [b, heads, s, d]`` over the t ≥ s keys of a cache; mask [s, t] or [b, 1, s, t], True = seen."""
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shared)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    causal: bool,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The flash-attn package (Dao, arXiv 2307.08691), whose layout is [b, s, heads, d] and GQA is native."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    seen = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": causal, "window_size": seen}
    if documents is not None:
        return _end_to_end(partial(flash_attn_varlen_func, **options), q, k, v, documents)
    return flash_attn_func(*(each.transpose(1, 2) for each in (q, k, v)), **options).transpose(1, 2)


@torch.compiler.disable  # a graph would be for these documents only
def _end_to_end(
    run: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
) -> torch.Tensor:
    """``run`` on the documents of all rows, laid end to end: [tokens, heads, d]."""
    packed = [each.transpose(1, 2).flatten(0, 1) for each in (q, k, v)]
    ends, longest = documents.cumulative, documents.longest
    out = run(*packed, ends, ends, longest, longest)
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def flash_serves(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether flash-attn is installed and has a kernel for this."""
    return flash_knows(device, dtype, head_size) and find_spec("flash_attn") is not None


ATTENTION_KERNELS: dict[str, AttentionKernel] = {
    "flash_attn": AttentionKernel(
        flash_attention,
        flash_serves,
        "the flash-attn package, a CUDA device of compute capability 8.0 (Ampere) or more, heads of at most "
        "256 channels and fp16 or bf16",
    ),
    "sdpa": AttentionKernel(sdpa_attention, lambda device, dtype, head_size: True, "nothing"),
}
"""``attention_backend`` → kernel, the preferred first. To add one: a line here."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The name of the kernel that ``attention_backend = name`` ("auto": the first that serves) means there.

    Raises:
        ConfigError: the kernel that was asked for cannot run there, or there is none of this name.
    """
    if name == "auto":
        found = (
            each for each, kernel in ATTENTION_KERNELS.items() if kernel.serves(device, dtype, head_size)
        )
        return next(found)
    if name not in ATTENTION_KERNELS:
        raise ConfigError(f"attention_backend: {name} is none of auto, {', '.join(ATTENTION_KERNELS)}.")
    kernel = ATTENTION_KERNELS[name]
    if not kernel.serves(device, dtype, head_size):
        raise ConfigError(
            f"attention_backend: {name} needs {kernel.needs}, but the model is {dtype} with heads of "
            f'{head_size} on {device.type}; set it to "auto".'
        )
    return name
