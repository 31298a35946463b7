"""How much a sequence costs to train on."""

from __future__ import annotations

from megatron_lite.config import Config
from megatron_lite.planner.parameters import parameters_by_place


def flops_per_sequence(config: Config) -> int:
    """Floating-point operations of forward and backward of one sequence of ``seq_length`` tokens.

    (6·N + 12·L·H·Q·T)·T, with N the parameters that tokens are multiplied with, L layers, H heads of size Q,
    T tokens: two operations per parameter and token forward, four backward; attention's two T-by-T products
    are counted whole, causal or not, in a layer with a window W the two T-by-W products (in both directions
    2 W - 1). What activation checkpointing computes again is not counted, so MFU compares runs with and
    without. Source: PaLM, arXiv 2204.02311, appendix B; nanoGPT counts the same.
    """
    model = config.model
    widths = [window or model.seq_length for window in model.attention_windows]
    seen = sum(min(width if model.causal else 2 * width - 1, model.seq_length) for width in widths)
    attention = 12 * model.num_attention_heads * model.head_size * seen
    return (6 * parameters_by_place(config).in_matmuls + attention) * model.seq_length
