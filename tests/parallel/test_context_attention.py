"""Attention by context ranks against attention by one with a dense mask, on real ranks; its dropout."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from layout_runs import KEYS
from ranks import run_ranks

from megatron_lite.config import config_from_keys
from megatron_lite.model.places import Places, places_of
from megatron_lite.model.tiled import ring_attention, tiled_attention
from megatron_lite.model.tiles import ring_plan
from megatron_lite.model.ulysses import own_tokens, whole_sequences
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.sequence import ContextParallel, token_runs
from megatron_lite.training.loop import seed_dropout

CPU = torch.device("cpu")
SHAPES = [(48, 4, 2, 8), (64, 6, 1, 8), (96, 4, 4, 4)]
"""Length, heads, key heads, width of a head; 6 heads are too many for four ranks of Ulysses."""

MASKS = [(True, None), (True, 1), (True, 5), (True, 20), (True, 60), (False, None), (False, 5), (False, 20)]
"""Whether attention is causal, and its window."""


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """softmax over the keys of the document less than ``window`` away, causal up to i, by a mask of all
    pairs."""
    place = torch.arange(q.shape[2])
    first = torch.zeros(len(q), len(place), dtype=torch.int64) if starts is None else starts
    seen = first[:, :, None] == first[:, None]
    if causal:
        seen &= place <= place[:, None]
    if window is not None:
        seen &= (place - place[:, None]).abs() < window
    per_key = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(per_key, 1).mT * (scale or 1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v.repeat_interleave(per_key, 1)


def some_starts(length: int) -> torch.Tensor:
    begins = torch.rand(3, length) < 0.1
    begins[2] = False  # one document
    return torch.where(begins, torch.arange(length), 0).cummax(1).values


def share(x: torch.Tensor, context: ContextParallel) -> torch.Tensor:
    return context.share(x.transpose(1, 2)).transpose(1, 2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: Places,
    causal: bool,
    window: int | None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """As the model's attention does."""
    context = places.context
    if context.ring:
        return ring_attention(q, k, v, dropout, causal, window, places, scale)
    whole = whole_sequences(q, k, v, context.axis)
    out = tiled_attention(*whole, dropout, causal, window, places.documents, scale)
    return own_tokens(out, context.axis)


def worst_errors(ranks: int, dtype_name: str) -> dict[str, float]:
    """The largest difference of outputs and gradients over all shapes, windows and documents."""
    rank, dtype = torch.distributed.get_rank(), getattr(torch, dtype_name)
    worst: dict[str, float] = {}
    torch.manual_seed(1)
    for length, heads, key_heads, width in SHAPES:
        sizes = [(3, count, length, width) for count in (heads, key_heads, key_heads, heads)]
        q, k, v, gradient = (torch.randn(size, dtype=dtype) for size in sizes)
        for starts in (None, some_starts(length)):
            for causal, window in MASKS:
                leaves = [each.clone().requires_grad_() for each in (q, k, v)]
                scale = 0.2 if window == 20 else None
                expected = dense(*leaves, starts, causal, window, scale)
                expected.backward(gradient)
                for ring in (True, False):
                    if not ring and heads % ranks:
                        continue
                    context = ContextParallel(Axis(ranks, rank), ring)
                    places = places_of(starts, length, CPU, context)
                    assert places is not None
                    own = [share(each, context).clone().requires_grad_() for each in (q, k, v)]
                    out = attend(*own, places, causal, window, scale=scale)
                    out.backward(share(gradient, context))
                    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(own, leaves, strict=True))]
                    error = max(float((a - share(b, context)).abs().max()) for a, b in pairs)
                    kind = "ring" if ring else "ulysses"
                    name = f"{kind} {length} {starts is not None} {causal} {window}"
                    worst[name] = max(worst.get(name, 0.0), error)
    return worst


@pytest.mark.parametrize(("ranks", "dtype", "limit"), [(2, "float64", 1e-13), (4, "float32", 5e-6)])
def test_context_ranks_compute_what_one_does(ranks: int, dtype: str, limit: float) -> None:
    for errors in run_ranks(worst_errors, ranks, ranks, dtype):
        assert len(errors) == 96 if ranks == 2 else 80
        assert max(errors.values()) < limit, max(errors, key=errors.__getitem__)


def dropped() -> tuple[list[float], float]:
    """The values beside 0 of kept weights over weights, and the share of weights that are 0, by ring."""
    rank = torch.distributed.get_rank()
    context = ContextParallel(Axis(2, rank), ring=True)
    places = places_of(None, 16, CPU, context)
    assert places is not None
    torch.manual_seed(5)
    q, k = torch.randn(4, 2, 16, 16), torch.randn(4, 2, 16, 16)
    v = torch.eye(16).expand(4, 2, 16, 16)  # outputs are the weights themselves
    weights = share(dense(q, k, v, None, True, None, None), context)
    torch.manual_seed(7 + rank)
    kept = attend(*(share(each, context) for each in (q, k, v)), places, True, None, dropout=0.25)
    seen = weights > 0
    ratios = (kept / weights)[seen]
    return sorted(set((ratios * 1000).round().tolist())), float((ratios == 0).float().mean())


def test_dropout_leaves_out_weights_and_scales_the_others() -> None:
    for values, share_dropped in run_ranks(dropped, 2):
        assert values == [0.0, 1333.0]
        assert share_dropped == pytest.approx(0.25, abs=0.05)


def test_context_ranks_drop_each_their_own() -> None:
    """And tensor ranks the same, as before."""
    config = config_from_keys({**KEYS, "context_parallel_size": 2, "model_parallel_size": 2}, world_size=4)
    drawn = set()
    for context_rank, tensor_rank in itertools.product((0, 1), (0, 1)):
        axes = {"context": Axis(2, context_rank), "tensor": Axis(2, tensor_rank)}
        seed_dropout(config, ParallelContext(0, 4, 0, CPU, **axes), step=3)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 2


def gradients_by_differences() -> bool:
    """gradcheck of the ring with dropout: each rank moves its own numbers, both compute."""
    rank = torch.distributed.get_rank()
    context = ContextParallel(Axis(2, rank), ring=True)
    starts = torch.tensor([[0, 0, 0, 0, 0, 0, 6, 6]])
    places = places_of(starts, 8, CPU, context)
    assert places is not None
    torch.manual_seed(3)
    q, k, v, direction = (torch.randn(4, 1, 2, 8, 3, dtype=torch.float64)).unbind()
    whole = [q, k[:, :1], v[:, :1]]
    own = [share(each, context).clone().requires_grad_() for each in whole]

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11 + rank)
        return (attend(*inputs, places, True, 5, dropout=0.3) * share(direction, context)).sum()

    loss(*own).backward()
    step = 1e-6
    for number, tensor in enumerate(whole):
        for index in range(tensor.numel()):
            moved = [each.clone() for each in whole]
            sums = []
            for sign in (1, -1):
                moved[number] = tensor.clone()
                moved[number].view(-1)[index] += sign * step
                total = loss(*(share(each, context) for each in moved)).detach()
                torch.distributed.all_reduce(total)
                sums.append(float(total))
            mark = torch.zeros(tensor.numel())
            mark[index] = 1
            mine = share(mark.view(tensor.shape), context).bool()
            if mine.any():
                assert abs(float(own[number].grad[mine]) - (sums[0] - sums[1]) / (2 * step)) < 1e-7
    return True


def test_dropout_s_gradients() -> None:
    assert run_ranks(gradients_by_differences, 2) == [True, True]


def work(ranks: int, length: int, causal: bool, **mask: Any) -> list[int]:
    """Pairs of tokens that each rank computes."""
    found = []
    for rank in range(ranks):
        total = 0
        for step in ring_plan(length, ranks, rank, mask.get("bounds"), mask.get("window"), causal):
            for tile in step.tiles:
                m, n = tile.shape.queries, tile.shape.keys
                total += m * (m + 1) // 2 if tile.shape.right == 0 and tile.shape.left is None else m * n
        found.append(total)
    return found


def test_zigzag_gives_every_rank_the_same_work() -> None:
    for causal, of_all in ((True, 64 * 65 // 2), (False, 64 * 64)):
        pairs = work(4, 64, causal)
        assert len(set(pairs)) == 1
        assert sum(pairs) == of_all
    runs = [token_runs(64, 4, rank, ring=True) for rank in range(4)]
    assert sorted(place for rank in runs for run in rank for place in run) == list(range(64))


def test_what_is_not_seen_is_neither_computed_nor_sent() -> None:
    documents = (tuple(range(0, 65, 8)),)  # of a chunk each
    for rank in range(4):
        for causal in (True, False):
            first, *others = ring_plan(64, 4, rank, documents, None, causal)
            assert first.tiles
            assert all(not step.tiles and step.sent == step.received == slice(0, 0) for step in others)
        sent = sum(step.sent.stop - step.sent.start for step in ring_plan(64, 4, rank, None, 4, True)[1:])
        assert sent <= 2 * 3  # three keys of a chunk's end are seen from the next chunk
