"""From logits to the next token.

The filters run in the order of Hugging Face's logits processors: repetition penalty, no repeated n-gram,
temperature, top-k, top-p. Shapes: b rows (sequences), v vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lite.utils.errors import ConfigError
from megatron_lite.utils.seeds import derive_seed

BLOCKED = float("-inf")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities add up to this (nucleus sampling,
            Holtzman et al., arXiv 1904.09751); 0 or 1 keeps all.
        repetition_penalty: tokens that occurred are made this much less likely (Keskar et al., arXiv
            1909.05858); 1 leaves them.
        no_repeat_ngram_size: no n tokens in a row occur twice; 0 allows it.
        seed: of the draws. A row's draws depend on the seed and the row's number only, not on the other rows
            of the batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, correct, range_ in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 leaves the logits as they are)"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0 (0 allows repetition)"),
        ):
            if not correct:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {range_}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without drawing."""
        return self.temperature == 0


class Sampler:
    """Chooses tokens for b rows by one :class:`Sampling`.

    Args:
        sampling: how.
        row_numbers: the number of each row among all that are asked for; seeds its draws.
    """

    def __init__(self, sampling: Sampling, row_numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self._generators = [
            torch.Generator("cpu").manual_seed(derive_seed(sampling.seed, "generation", number))
            for number in row_numbers
        ]

    def __call__(self, logits: torch.Tensor, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """The next token [b] int64 of each row, from its ``logits`` [b, v] and the tokens before it."""
        scores = filter_logits(logits.float(), histories, self.sampling)
        if self.sampling.is_greedy:
            return scores.argmax(-1)
        # Inverse of the cumulative distribution, in fp64: one uniform number a row, drawn on the CPU so that
        # every device draws the same.
        draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])
        cumulative = scores.double().softmax(-1).cumsum(-1)
        threshold = draws.to(scores.device) * cumulative[:, -1:]
        return (
            torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=scores.shape[-1] - 1)
        )


def filter_logits(
    logits: torch.Tensor, histories: Sequence[Sequence[int]], sampling: Sampling
) -> torch.Tensor:
    """``logits`` [b, v] fp32 after all filters; tokens ruled out are -inf. The input is left as it was."""
    scores = logits
    if sampling.repetition_penalty != 1.0:
        scores = penalize_repetition(scores, histories, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size > 0:
        scores = block_repeated_ngrams(scores, histories, sampling.no_repeat_ngram_size)
    if sampling.is_greedy:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k > 0:
        scores = keep_top_k(scores, sampling.top_k)
    if 0.0 < sampling.top_p < 1.0:
        scores = keep_top_p(scores, sampling.top_p)
    return scores


def penalize_repetition(
    scores: torch.Tensor, histories: Sequence[Sequence[int]], penalty: float
) -> torch.Tensor:
    """Divide positive scores of tokens that occurred by ``penalty``, multiply negative ones by it."""
    scores = scores.clone()
    for row, history in zip(scores, histories, strict=True):
        seen = torch.tensor(sorted(set(history)), dtype=torch.int64, device=scores.device)
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


def block_repeated_ngrams(
    scores: torch.Tensor, histories: Sequence[Sequence[int]], size: int
) -> torch.Tensor:
    """Rule out each token that would complete an n-gram of ``size`` tokens for the second time.

    A row where that would leave no token at all stays as it is (``size`` 1 and a long text).
    O(length of the history) a row and step, on the CPU.
    """
    scores = scores.clone()
    for row, history in zip(scores, histories, strict=True):
        opening = list(history[len(history) - size + 1 :])
        starts = range(len(history) - size + 1)
        blocked = {
            history[start + size - 1]
            for start in starts
            if list(history[start : start + size - 1]) == opening
        }
        if len(blocked) < len(row):
            row[sorted(blocked)] = BLOCKED
    return scores


def keep_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Rule out what is below the k-th highest score of its row (ties with it stay)."""
    lowest = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < lowest, BLOCKED)


def keep_top_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Rule out all but the likeliest tokens that together reach probability ``p``; one at least stays."""
    ordered, order = scores.sort(descending=False)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(-1, order, removed), BLOCKED)
