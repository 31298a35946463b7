"""Attention kernels: the portable one and the fast one, chosen by what is present.

A kernel computes softmax(q kᵀ / √d) v, causal, with grouped-query attention: ``q [b, heads, s, d]``,
``k`` and ``v [b, kv_heads, s, d]`` with any strides but a contiguous last dimension → [b, heads, s, d].
Query head i reads the key head i // (heads / kv_heads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from megatron_lite.utils.errors import ConfigError


@dataclass(frozen=True)
class AttentionKernel:
    """One implementation of causal attention.

    Attributes:
        run: (q, k, v, dropout probability) → output.
        serves: (device type, dtype) → whether it can run there.
        needs: what it asks for, for the error message.
    """

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    serves: Callable[[str, torch.dtype], bool]
    needs: str


def causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """torch's scaled_dot_product_attention over whole sequences."""
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def masked_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``q [b, heads, s, d]`` over the t ≥ s keys of a cache; mask [s, t] or [b, 1, s, t], True = seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def causal_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """The flash-attn package (Dao, arXiv 2307.08691), whose layout is [b, s, heads, d] and GQA is native."""
    from flash_attn import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout, causal=True)
    return out.transpose(1, 2)


def flash_serves(device_type: str, dtype: torch.dtype) -> bool:
    """Whether flash-attn is installed and has a kernel for this."""
    return (
        device_type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and find_spec("flash_attn") is not None
    )


ATTENTION_KERNELS: dict[str, AttentionKernel] = {
    "flash_attn": AttentionKernel(
        causal_flash, flash_serves, "the flash-attn package, a CUDA device and fp16 or bf16"
    ),
    "sdpa": AttentionKernel(causal_sdpa, lambda device_type, dtype: True, "nothing"),
}
"""``attention_backend`` → kernel, the preferred first. To add one: a line here."""


def choose_kernel(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the kernel that ``attention_backend = name`` ("auto": the first that serves) means there.

    Raises:
        ConfigError: the kernel that was asked for cannot run there, or there is none of this name.
    """
    if name == "auto":
        return next(each for each, kernel in ATTENTION_KERNELS.items() if kernel.serves(device_type, dtype))
    if name not in ATTENTION_KERNELS:
        raise ConfigError(f"attention_backend: {name} is none of auto, {', '.join(ATTENTION_KERNELS)}.")
    kernel = ATTENTION_KERNELS[name]
    if not kernel.serves(device_type, dtype):
        raise ConfigError(
            f"attention_backend: {name} needs {kernel.needs}, but the model is {dtype} on {device_type};"
            ' set it to "auto".'
        )
    return name
