"""How likely the model finds given tokens: a forward pass without a cache, and the head where it is asked.

Shapes: b rows, s tokens, n places that are asked about, v entries of the vocabulary, of which a tensor rank
has v / ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lite.model import GPT
from megatron_lite.model.loss import token_loss
from megatron_lite.model.places import Places
from megatron_lite.model.recompute import run_layers
from megatron_lite.parallel.context import Axis

LOGITS_AT_ONCE = 2**26
"""Logits that are computed together: bounds their memory (256 MB in fp32), whatever the batch."""


@dataclass(frozen=True)
class Row:
    """Tokens that the model reads, and what may follow the last of them.

    Attributes:
        tokens: what is read; the context's length at most.
        targets: what is scored. Each is a run of tokens of which the last follows ``tokens``: those before it
            are the end of ``tokens`` itself.
    """

    tokens: tuple[int, ...]
    targets: Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Score:
    """What the model thinks of a target: its log-likelihood in nats, and whether it would choose it."""

    log_likelihood: float
    is_greedy: bool


def batches_of(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """``rows`` in batches of ``batch_tokens`` tokens at most, padding included; of one row at least.

    By length, the longest first: little is padded, and a batch too large for the memory is the first one.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].tokens) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.inference_mode()
def score(gpt: GPT, rows: Sequence[Row]) -> list[list[Score]]:
    """The score of each target of each of ``rows``, which are one batch.

    Every entry of the vocabulary takes part in the softmax, those that only pad it too, as in training.
    """
    device = next(gpt.parameters()).device
    width = max(len(row.tokens) for row in rows)
    # Padding on the right is seen by no token that counts.
    tokens = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows], device=device)
    targets = [(number, len(row.tokens), target) for number, row in enumerate(rows) for target in row.targets]
    places = [(row, end - len(target) + k) for row, end, target in targets for k in range(len(target))]
    followers = [token for _, _, target in targets for token in target]
    labels = torch.tensor(followers, dtype=torch.int64, device=device)
    at = torch.tensor(places, dtype=torch.int64, device=device).view(len(places), 2).T
    losses, likeliest = predictions(gpt, read(gpt, tokens)[at[0], at[1]], labels)
    lengths = [len(target) for _, _, target in targets]
    sums = [float(part.sum()) for part in losses.double().cpu().split(lengths)]
    agreed = [bool(part.all()) for part in (likeliest == labels).cpu().split(lengths)]
    scores: list[list[Score]] = [[] for _ in rows]
    for (row, _, _), nats, is_greedy in zip(targets, sums, agreed, strict=True):
        scores[row].append(Score(-nats, is_greedy))
    return scores


def read(gpt: GPT, tokens: torch.Tensor, places: Places | None = None) -> torch.Tensor:
    """``tokens [b, s]`` → [b, s, hidden], from which the head predicts."""
    return run_layers(list(gpt.layers)[:-1], tokens, None, places)


def predictions(gpt: GPT, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From ``hidden [n, hidden]``: the loss of ``labels [n]`` (fp32, nats), and the likeliest tokens [n]."""
    head, axis = gpt.layers[-1], gpt.tensor.axis
    step = max(1, LOGITS_AT_ONCE // gpt.config.padded_vocab_size)
    losses, likeliest = [], []
    for part, wanted in zip(hidden.split(step), labels.split(step), strict=True):
        logits = head(part[None])
        likeliest.append(_likeliest(logits[0], axis))
        losses.append(token_loss(logits, wanted[None], axis)[0])
    return torch.cat(losses), torch.cat(likeliest)


def _likeliest(logits: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The likeliest tokens [n] by ``logits [n, v / ranks]``; of equals the first."""
    own = logits.argmax(-1)
    if axis.size == 1:
        return own
    best = torch.stack([logits.gather(-1, own[:, None])[:, 0].double(), own + axis.rank * logits.shape[-1]])
    every = [torch.empty_like(best) for _ in range(axis.size)]
    dist.all_gather(every, best, group=axis.group)
    tops, tokens = torch.stack(every).unbind(1)
    return tokens.gather(0, tops.argmax(0, keepdim=True))[0].long()
