"""Documents that share a row do not see each other; windows end where they should."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch._dynamo.testing
from small_models import by_name, random_tokens, scatter_weights, small_gpt

from megatron_lite.model import GPT, kernels, token_loss
from megatron_lite.model.block import Block
from megatron_lite.model.kernels import flash_attention, sdpa_attention
from megatron_lite.model.places import Bounds, Documents, Places, places_of
from megatron_lite.model.tile_kernels import CPU_FLASH, CUDA_FLASH, PLAIN, TileKernel
from megatron_lite.model.tiles import Shape, ring_plan
from megatron_lite.parallel.sequence import token_runs

CPU = torch.device("cpu")
LENGTH = 20
BOUNDS = ((0, 3, 4, 11, LENGTH), (0, LENGTH), (0, 7, 13, LENGTH))
MODELS: list[dict[str, Any]] = [
    {"pos_emb": "rotary", "num_kv_heads": 2},
    {"pos_emb": "learned", "num_kv_heads": 1, "gpt_j_residual": True},
    {"pos_emb": "learned", "sliding_window_width": 4, "checkpoint_activations": True},
    {"pos_emb": "rotary", "sliding_window_width": 3, "attention_config": [[["local", "global"], "all"]]},
    {"pos_emb": "rotary", "sliding_window_width": 3, "mlm_training": True, "mlm_mask_id": 0},
    {"pos_emb": "sinusoidal", "kv_channels": 12},
    {"pos_emb": "learned", "opt_pos_emb_offset": 2, "attention_scale": 1.0},
]


def starts_of(bounds: Bounds) -> torch.Tensor:
    starts = torch.zeros(len(bounds), bounds[0][-1], dtype=torch.int64)
    for row, places in enumerate(bounds):
        for place in places[:-1]:
            starts[row, place:] = place
    return starts


def places(reset_positions: bool = True) -> Places:
    found = places_of(starts_of(BOUNDS), LENGTH, CPU, reset_positions=reset_positions)
    assert found is not None
    return found


@pytest.fixture(params=MODELS, ids=lambda keys: "-".join(map(str, keys.values())))
def gpt(request: pytest.FixtureRequest) -> GPT:
    model = small_gpt(**request.param).train()
    scatter_weights(model)
    return model


def test_rows_of_documents_equal_documents_alone(gpt: GPT) -> None:
    """Logits, and the gradient of every parameter."""
    tokens = random_tokens(3, LENGTH + 1)
    tokens, labels = tokens[:, :-1], tokens[:, 1:]
    logits = gpt(tokens, None, places())
    kept = logits.detach().clone()  # the loss writes its gradient over them
    token_loss(logits, labels).sum().backward()
    together = {name: parameter.grad for name, parameter in by_name(gpt).items()}
    gpt.zero_grad()
    for row, bounds in enumerate(BOUNDS):
        for first, last in pairwise(bounds):
            own = (slice(row, row + 1), slice(first, last))
            alone = gpt(tokens[own])
            torch.testing.assert_close(kept[own], alone, rtol=1e-5, atol=1e-5)
            token_loss(alone, labels[own]).sum().backward()
    for name, parameter in by_name(gpt).items():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(together[name], parameter.grad, rtol=0, atol=2e-6 * max(scale, 1.0))


def test_nothing_leaks_from_document_to_document(gpt: GPT) -> None:
    """Other tokens in one document leave the others' logits as they are, bit for bit."""
    tokens = random_tokens(3, LENGTH)
    other = tokens.clone()
    other[0, 4:11] = (other[0, 4:11] + 1) % 100
    with torch.no_grad():
        before, after = gpt(tokens, None, places(False)), gpt(other, None, places(False))
    changed = (before != after).any(-1)
    assert changed[0, 4:11].all()
    changed[0, 4:11] = False
    assert not changed.any()


def test_positions_are_counted_on_unless_they_are_reset() -> None:
    gpt = small_gpt(pos_emb="learned").eval()
    scatter_weights(gpt)
    tokens = random_tokens(3, LENGTH)
    with torch.no_grad():
        counted, reset = gpt(tokens, None, places(False)), gpt(tokens, None, places(True))
        alone = gpt(tokens)
    torch.testing.assert_close(counted[:, :3], alone[:, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(counted[1], reset[1], rtol=0, atol=1e-5)
    assert (counted[0, 4:] - reset[0, 4:]).abs().amax(-1).min() > 1e-3


def pairs(bounds: Bounds, window: int | None, causal: bool) -> torch.Tensor:
    """The mask of all pairs, [b, s, s], by the definition."""
    first = starts_of(bounds)
    place = torch.arange(first.shape[1])
    found = first[:, :, None] == first[:, None]
    if causal:
        found &= place <= place[:, None]
    if window is not None:
        found &= (place - place[:, None]).abs() < window
    return found


def by_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention with a dense mask [b or 1, m, n]."""
    per_key = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(per_key, 1).mT * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(~mask[:, None], -math.inf)
    return scores.softmax(-1).nan_to_num() @ v.repeat_interleave(per_key, 1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """flash-attn as its documentation says, by a dense mask: query i of m sees key j of n if
    i + n - m - left <= j <= i + n - m + right, where -1 is no limit; causal is right = 0."""
    mask = between(q.shape[1], k.shape[1], window_size[0], 0 if causal else window_size[1])
    heads = (each.transpose(1, 2) for each in (q, k, v))
    return by_mask(*heads, mask[None], softmax_scale).transpose(1, 2)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    **options: Any,
) -> torch.Tensor:
    """The same for sequences laid end to end."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert cu_seqlens_q[-1] == len(q)
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(each[None].split(lengths, 1) for each in (q, k, v)), strict=True)
    return torch.cat([flash_attn_func(*part, dropout_p, **options)[0] for part in parts])


def varlen_attn(
    *given: Any,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's, by its documentation: -1 is no border; fewer key heads are asked for by enable_gqa."""
    assert enable_gqa or given[0].shape[1] == given[1].shape[1]
    return flash_attn_varlen_func(*given, 0.0, causal=False, window_size=window_size, softmax_scale=scale)


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [sdpa_attention, flash_attention])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_kernels_see_what_the_definition_says(
    kernel: Any, causal: bool, window: int | None, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = Mock(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    q, k, v = torch.randn(3, 4, LENGTH, 8), torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8)
    documents = Documents(BOUNDS, CPU)
    expected = by_mask(q, k, v, pairs(BOUNDS, window, causal), scale)
    torch.testing.assert_close(kernel(q, k, v, 0.0, causal, window, documents, scale), expected)
    alone = kernel(q[1:2], k[1:2], v[1:2], 0.0, causal, window, None, scale)
    torch.testing.assert_close(alone, expected[1:2])


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_cuda_takes_all_documents_at_once(
    causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all rows; the real operator takes the arguments (on the meta device)."""
    monkeypatch.setattr(kernels, "tile_kernel", lambda q, dropout: CUDA_FLASH)
    q, k, v = torch.randn(3, 4, LENGTH, 8), torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8)
    on_meta = [each.to("meta", torch.bfloat16).requires_grad_() for each in (q, k, v)]
    out = sdpa_attention(*on_meta, 0.0, causal, window, Documents(BOUNDS, torch.device("meta")), 0.9)
    out.backward(torch.empty_like(out))
    assert [each.grad.shape for each in on_meta] == [q.shape, k.shape, v.shape]

    stand_in = Mock(side_effect=varlen_attn)
    monkeypatch.setattr(kernels, "varlen_attn", stand_in)
    found = sdpa_attention(q, k, v, 0.0, causal, window, Documents(BOUNDS, CPU), 0.9)
    torch.testing.assert_close(found, by_mask(q, k, v, pairs(BOUNDS, window, causal), 0.9))
    assert stand_in.call_count == 1


SHAPES = [
    Shape(300, 300, None, 0),
    Shape(300, 300, 40, 0),
    Shape(300, 300, 40, 40),
    Shape(20, 30, None, None),
    Shape(290, 300, 270, None),
    Shape(290, 300, None, 270),
    Shape(300, 290, None, 17),
    Shape(30, 30, 0, None),
    Shape(30, 30, None, 0),
    Shape(1, 1, None, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("kernel", [CPU_FLASH, PLAIN], ids=["flash", "plain"])
def test_tiles_are_the_formula(kernel: TileKernel, scale: float | None, shape: Shape) -> None:
    """Output, logarithm and gradients of shapes of several blocks and of one."""
    m, n = shape.queries, shape.keys
    q, k, v, gradient = (
        torch.randn(2, heads, length, 4, dtype=torch.float64, requires_grad=True)
        for heads, length in ((4, m), (2, n), (2, n), (4, m))
    )
    mask = between(m, n, *(-1 if border is None else border for border in (shape.left, shape.right)))
    expected = by_mask(q, k, v, mask[None], scale)
    expected.backward(gradient)
    with torch.no_grad():
        out, log, drawn = kernel.forward(q, k, v, shape, scale, 0.0, 0)
        scores = (q @ k.repeat_interleave(2, 1).mT * (scale or 0.5)).masked_fill(~mask, -math.inf)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(log, scores.logsumexp(-1))
        found = kernel.backward(gradient, q, k, v, out, log, shape, scale, 0.0, drawn)
    for got, leaf in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(got, leaf.grad)


def clipped(keys: int, left: int | None, right: int | None) -> tuple[int, int]:
    """The window that torch's kernel takes the borders for (mha_fwd, then set_params_fprop)."""
    left, right = (-1 if border is None or border >= keys else border for border in (left, right))
    if left < 0 <= right:
        left = keys
    elif right < 0 <= left:
        right = keys
    return left, right


def between(m: int, n: int, left: int, right: int) -> torch.Tensor:
    """Which of n keys each of m queries sees, by borders of a window, -1 for none."""
    distance = torch.arange(n) - torch.arange(m)[:, None] - (n - m)
    seen = torch.ones(m, n, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


PLANS = [  # length, ranks, bounds, window, causal
    (256, 2, ((0, 60, 256),), 100, True),  # four keys of a document, its other tokens elsewhere
    (256, 2, ((0, 20, 140, 256),), 40, False),
    (256, 4, ((0, 30, 31, 97, 256), (0, 131, 256)), 50, True),
    (256, 4, ((0, 30, 31, 97, 256), (0, 131, 256)), 50, False),
    (64, 2, None, 9, True),
    (64, 2, None, 33, False),
]


@pytest.mark.parametrize(("length", "ranks", "bounds", "window", "causal"), PLANS)
def test_torch_s_kernel_sees_in_every_tile_what_is_meant(
    length: int, ranks: int, bounds: Bounds | None, window: int, causal: bool
) -> None:
    """And no query sees nothing: its logarithm would be infinite there, and the merged output NaN."""
    for rank in range(ranks):
        seen = torch.zeros(len(bounds or [0]), length, length, dtype=torch.bool)
        own = torch.tensor([place for run in token_runs(length, ranks, rank, ring=True) for place in run])
        for step in ring_plan(length, ranks, rank, bounds, window, causal):
            runs = token_runs(length, ranks, step.origin, ring=True)
            theirs = torch.tensor([place for run in runs for place in run])[step.received]
            for tile in step.tiles:
                m, n = tile.shape.queries, tile.shape.keys
                mask = between(m, n, *clipped(n, tile.shape.left, tile.shape.right))
                assert mask.any(1).all()
                for row in range(len(seen))[tile.rows]:
                    places = torch.meshgrid(own[tile.queries], theirs[tile.keys], indexing="ij")
                    assert not seen[row][places].any(), "a pair is in two tiles"
                    seen[row][places] = mask
        assert torch.equal(seen[:, own], pairs(bounds or ((0, length),), window, causal)[:, own])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_s_flash_is_asked_for_the_same(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operator takes the arguments (on the meta device), and means the same by them."""
    q, k = torch.randn(1, 2, shape.queries, 8), torch.randn(1, 1, shape.keys, 8)
    on_meta = [each.to("meta", torch.bfloat16) for each in (q, k, k)]
    out, log, drawn = CUDA_FLASH.forward(*on_meta, shape, 0.9, 0.1, 0)
    found = CUDA_FLASH.backward(out, *on_meta, out, log, shape, 0.9, 0.1, drawn)
    assert [each.shape for each in found] == [q.shape, k.shape, k.shape]

    def operator(
        *given: Any, scale: float | None, window_size_left: int | None, window_size_right: int | None
    ) -> tuple[Any, ...]:
        q, k, v, _, _, m, n, dropout, causal, _ = given
        assert (m, n) == (q.shape[1], k.shape[1])
        window = clipped(n, window_size_left, window_size_right)
        return flash_attn_func(q, k, v, dropout, causal, window, scale), None, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    mine, *_ = CUDA_FLASH.forward(q, k, k, shape, 0.9, 0.0, 0)
    torch.testing.assert_close(mine, CPU_FLASH.forward(q, k, k, shape, 0.9, 0.0, 0)[0])


def test_recomputing_with_documents_and_dropout_is_exact() -> None:
    tokens = random_tokens(3, LENGTH)
    keys = {"pos_emb": "rotary", "attention_dropout": 0.2, "sliding_window_width": 6}
    gradients = []
    for recompute in (False, True):
        gpt = small_gpt(**keys, checkpoint_activations=recompute).train()
        torch.manual_seed(3)
        gpt(tokens, None, places()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in by_name(gpt).items()})
    kept, recomputed = gradients
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn"])
def test_a_batch_of_other_documents_compiles_nothing_anew(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", Mock(flash_attn_varlen_func=flash_attn_varlen_func))
    everywhere = replace(kernels.ATTENTION_KERNELS[backend], serves=lambda device, dtype, head_size: True)
    monkeypatch.setitem(kernels.ATTENTION_KERNELS, backend, everywhere)
    torch.compiler.reset()
    block = small_gpt(pos_emb="none", attention_backend=backend).layers[1]
    assert isinstance(block, Block)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(block.compute, backend=counter)
    for shift in range(4):
        bounds = ((0, 3 + shift, LENGTH), (0, 1, LENGTH - shift - 1, LENGTH))
        found = places_of(starts_of(bounds), LENGTH, CPU)
        x = torch.randn(2, LENGTH, 64)
        torch.testing.assert_close(compiled(x, None, None, found), block(x, None, found))
        if shift == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames
