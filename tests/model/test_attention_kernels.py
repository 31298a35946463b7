"""Attention against its formula, and the choice of its kernel."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from small_models import random_tokens, scatter_weights, small_config, small_gpt

from megatron_lite.model import build_gpt, kernels
from megatron_lite.model.kernels import ATTENTION_KERNELS, choose_kernel, flash_attention, sdpa_attention
from megatron_lite.model.tile_kernels import CPU_FLASH, CUDA_FLASH, PLAIN, TileKernel, tile_kernel
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.utils.errors import ConfigError


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(q kᵀ / √d) v, head by head; if causal, the future removed."""
    out = torch.empty_like(q)
    per_key = q.shape[1] // k.shape[1]
    future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool() & causal
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // per_key].mT / math.sqrt(q.shape[-1])
        out[:, head] = scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, head // per_key]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_sdpa_is_the_formula(kv_heads: int, causal: bool) -> None:
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 8)
    torch.testing.assert_close(sdpa_attention(q, k, v, 0.0, causal), formula(q, k, v, causal))


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "capability", "installed", "expected", "tiles"),
    [
        ("cuda", torch.bfloat16, 128, (9, 0), True, "flash_attn", CUDA_FLASH),
        ("cuda", torch.float16, 256, (8, 0), True, "flash_attn", CUDA_FLASH),
        ("cuda", torch.float16, 100, (8, 6), True, "flash_attn", PLAIN),  # a head that is no multiple of 8
        ("cuda", torch.float16, 264, (9, 0), True, "sdpa", PLAIN),
        ("cuda", torch.float16, 64, (7, 5), True, "sdpa", PLAIN),  # T4
        ("cuda", torch.float32, 64, (9, 0), True, "sdpa", PLAIN),
        ("cuda", torch.bfloat16, 64, (9, 0), False, "sdpa", CUDA_FLASH),
        ("cpu", torch.bfloat16, 64, None, True, "sdpa", CPU_FLASH),
        ("cpu", torch.float32, 64, None, True, "sdpa", CPU_FLASH),
    ],
)
def test_auto_takes_the_fastest_that_serves(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int] | None,
    installed: bool,
    expected: str,
    tiles: TileKernel,
) -> None:
    """Flash attention 2 is for Ampere and newer, heads of up to 256; anything else falls back."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    there = torch.device(device)
    assert choose_kernel("auto", there, dtype, head_size) == expected
    assert choose_kernel("sdpa", there, dtype, head_size) == "sdpa"
    assert tile_kernel(Mock(device=there, dtype=dtype, shape=(1, 2, 4, head_size)), 0.0) is tiles


def test_a_forced_kernel_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"flash_attn needs .* fp16 or bf16, but the model is .* on cpu"):
        build_gpt(small_config(attention_backend="flash_attn"), ParameterFactory(1))


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """flash-attn's documented behaviour (layout [b, s, heads, d], causal off by default) by torch's SDPA."""
    assert window_size == (-1, -1)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous()


def test_model_with_a_stand_in_for_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Mock(side_effect=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", Mock(flash_attn_func=stand_in))
    everywhere = replace(ATTENTION_KERNELS["flash_attn"], serves=lambda device, dtype, head_size: True)
    monkeypatch.setitem(ATTENTION_KERNELS, "flash_attn", everywhere)
    tokens = random_tokens(2, 12)
    keys: dict[str, Any] = {"pos_emb": "rotary", "num_kv_heads": 2, "attention_scale": 0.7}
    by_sdpa = small_gpt(**keys, attention_backend="sdpa")
    by_flash = small_gpt(**keys, attention_backend="auto")
    for gpt in (by_sdpa, by_flash):
        scatter_weights(gpt)
    torch.testing.assert_close(by_flash(tokens), by_sdpa(tokens), rtol=0, atol=1e-5)
    assert stand_in.call_count == 2
    q, k, v = stand_in.call_args.args[:3]
    assert q.shape == (2, 12, 4, 16)
    assert k.shape == v.shape == (2, 12, 2, 16)
    assert all(each.stride(-1) == 1 for each in (q, k, v))


def test_flash_attn_gets_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Mock(side_effect=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", Mock(flash_attn_func=stand_in))
    q = k = v = torch.randn(1, 2, 4, 8)
    flash_attention(q, k, v, 0.25, True)
    expected = {"dropout_p": 0.25, "softmax_scale": None, "causal": True, "window_size": (-1, -1)}
    assert stand_in.call_args.kwargs == expected
