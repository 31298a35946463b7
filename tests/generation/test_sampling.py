"""Sampling against transformers' logits processors and against the distribution it draws from."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_lite.generation.sampling import Sampler, Sampling, filter_logits
from megatron_lite.utils.errors import ConfigError

VOCABULARY = 40


def logits_and_histories(rows: int = 6, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, generator=generator) * 3
    # A few distinct tokens only, so that n-grams do recur.
    histories = torch.randint(0, 4, (rows, length), generator=generator)
    return logits, histories


@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, 0), (1.3, 0), (1.0, 2), (1.2, 3)])
def test_filters_equal_transformers(
    top_k: int, top_p: float, temperature: float, penalty: float, ngram: int
) -> None:
    logits, histories = logits_and_histories()
    theirs = LogitsProcessorList()
    if penalty != 1.0:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
    if ngram:
        theirs.append(NoRepeatNGramLogitsProcessor(ngram))
    theirs.append(TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if 0.0 < top_p < 1.0:
        theirs.append(TopPLogitsWarper(top_p))
    sampling = Sampling(temperature, top_k, top_p, penalty, ngram)

    ours = filter_logits(logits, histories.tolist(), sampling)

    torch.testing.assert_close(ours, theirs(histories, logits.clone()), rtol=0, atol=0)


def test_the_filters_leave_their_input() -> None:
    logits, histories = logits_and_histories()
    before = logits.clone()
    filter_logits(logits, histories.tolist(), Sampling(0.5, 3, 0.5, 1.5, 2))
    assert torch.equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5]])
    sampling = Sampling(temperature=0.8, top_k=4, seed=3)
    draws = 20_000
    sampler = Sampler(sampling, range(draws))

    tokens = sampler(logits.expand(draws, -1), [[]] * draws)

    expected = filter_logits(logits, [[]], sampling).softmax(-1)[0] * draws
    counts = torch.bincount(tokens, minlength=5).float()
    assert counts[3] == 0  # ruled out by top-k
    kept = expected > 0
    chi_squared = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_squared < 16.27  # 99.9 % point of chi squared with 3 degrees of freedom


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits, histories = logits_and_histories()
    together = Sampler(Sampling(seed=7), range(6))
    alone = Sampler(Sampling(seed=7), [4])
    for _ in range(10):
        tokens = together(logits, histories.tolist())
        assert alone(logits[4:5], histories[4:5].tolist()).item() == tokens[4].item()


def test_seeds_reproduce_and_differ() -> None:
    logits = torch.zeros(1, 1000)
    first, again, other = (
        [Sampler(Sampling(seed=seed), [row])(logits, [[]]).item() for row in range(8)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(set(first)) > 1


def test_temperature_zero_takes_the_likeliest() -> None:
    logits, histories = logits_and_histories()
    tokens = Sampler(Sampling(temperature=0, top_k=5, top_p=0.1), range(6))(logits, histories.tolist())
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -2},
        {"temperature": float("nan")},
    ],
)
def test_wrong_values_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
