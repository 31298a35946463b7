"""Generation's cache gives the logits of reading everything at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_tokens, scatter_weights, small_gpt

from megatron_lite.model import GPT
from megatron_lite.utils.errors import ConfigError

LENGTH = 23
MODELS: list[dict[str, Any]] = [
    {"pos_emb": "rotary", "rotary_pct": 0.5},
    {"pos_emb": "rotary", "num_kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu"},
    {"pos_emb": "learned", "gpt_j_residual": True},
    {
        "pos_emb": "rotary",
        "num_kv_heads": 2,
        "sliding_window_width": 5,
        "attention_config": [[["global", "local"], "all"]],
    },
    {"pos_emb": "learned", "num_kv_heads": 1, "sliding_window_width": 1},
    {"pos_emb": "none", "num_kv_heads": 1, "use_qk_layernorm": True},
    {"pos_emb": "sinusoidal", "kv_channels": 24, "norm": "scalenorm", "use_qk_layernorm": True},
    {"pos_emb": "learned", "opt_pos_emb_offset": 2, "norm": "non_parametric_layernorm"},
]


@pytest.fixture(params=MODELS, ids=lambda keys: "-".join(map(str, keys.values())))
def gpt(request: pytest.FixtureRequest) -> GPT:
    model = small_gpt(**request.param).eval()
    scatter_weights(model)
    return model


def fed(
    gpt: GPT, tokens: torch.Tensor, chunks: list[int], starts: torch.Tensor | None = None
) -> torch.Tensor:
    """The logits of ``tokens`` fed in ``chunks``."""
    cache = gpt.new_cache(len(tokens), max_length=LENGTH + 5, starts=starts)
    with torch.inference_mode():
        return torch.cat([gpt(chunk, cache) for chunk in tokens.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize(
    "chunks", [[LENGTH], [1] * LENGTH, [7, 1, 1, 10, 4]], ids=["whole", "single", "mixed"]
)
def test_equals_full_forward(gpt: GPT, chunks: list[int]) -> None:
    tokens = random_tokens(3, LENGTH)
    with torch.no_grad():
        expected = gpt(tokens)
    torch.testing.assert_close(fed(gpt, tokens, chunks), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "chunks", [[LENGTH], [1] * LENGTH, [7, 1, 1, 10, 4]], ids=["whole", "single", "mixed"]
)
def test_left_padded_rows_equal_themselves_alone(gpt: GPT, chunks: list[int]) -> None:
    starts = torch.tensor([0, 5, 16])
    tokens = random_tokens(3, LENGTH)
    logits = fed(gpt, tokens, chunks, starts)
    assert torch.isfinite(logits).all()
    for row, start in enumerate(starts.tolist()):
        with torch.no_grad():
            alone = gpt(tokens[row : row + 1, start:])
        torch.testing.assert_close(logits[row : row + 1, start:], alone, rtol=0, atol=2e-5)


def test_training_after_generation(gpt: GPT) -> None:
    """What generation leaves behind (tables made under inference mode) serves autograd."""
    length = 32  # a table that no other test has made
    with torch.inference_mode():
        gpt(random_tokens(1, length))
    gpt.train()(random_tokens(1, length)).sum().backward()


def test_more_tokens_than_room() -> None:
    gpt = small_gpt()
    with pytest.raises(AssertionError, match="cache for 4"), torch.no_grad():
        gpt(random_tokens(1, 5), gpt.new_cache(1, max_length=4))


def test_a_model_that_sees_both_sides_has_no_cache() -> None:
    with pytest.raises(ConfigError, match="cannot write: to continue texts"):
        small_gpt(mlm_training=True, mlm_mask_id=0).new_cache(1, LENGTH)
