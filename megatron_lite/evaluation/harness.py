"""The model as lm-eval sees it (https://github.com/EleutherAI/lm-evaluation-harness).

Needs the package ``lm_eval``; :mod:`megatron_lite.evaluation.tasks` says how to get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_lite.evaluation.scoring import Row, Score, batches_of
from megatron_lite.evaluation.writing import Manner, Opening, kept_tokens
from megatron_lite.generation import Sampling, TextModel
from megatron_lite.parallel.team import Team
from megatron_lite.utils.log import LOGGER

DEFAULT_NEW_TOKENS = 256
"""Tokens of a continuation where the task does not say: lm-eval's own number for Hugging Face's models."""

KNOWN_OPTIONS = {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"}
"""Options of a task's ``generation_kwargs`` that mean something here, besides ``until`` and the length."""


class HarnessModel(TemplateLM):
    """Answers lm-eval's three kinds of requests.

    lm-eval runs on rank 0 alone and takes it for the only one; ``team`` divides the work. Tokens are those of
    the run's tokenizer, nothing is put before a text, and where nothing precedes a continuation the
    end-of-document token does.

    Args:
        model: what is evaluated; ``team`` has it too.
        team: knows the jobs ``score`` (a list of rows → their scores) and ``write`` ((openings, manner) →
            texts).
        batch_tokens: tokens of a batch at most, padding included.
        seed: of the draws of tasks that sample.
    """

    def __init__(self, model: TextModel, team: Team, batch_tokens: int, seed: int = 0) -> None:
        super().__init__()
        self._model = model
        self._team = team
        self._batch_tokens = batch_tokens
        self._seed = seed
        self.max_length = model.config.model.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which also stands for an empty context."""
        return self._model.tokenizer.eod_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells tokenizers apart by."""
        return self._model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The ids of ``string``; no token is ever added."""
        return self._model.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each by itself; every token is predicted once."""
        windows = [
            self._rolling(self.tok_encode(*request.args), self.prefix_token_id) for request in requests
        ]
        scores = iter(self._scores([pair for pairs in windows for pair in pairs]))
        return [sum((next(scores).log_likelihood for _ in pairs), 0.0) for pairs in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._windows(context, continuation) for _, context, continuation in requests]
        scores = iter(self._scores([pair for pairs in windows for pair in pairs]))
        answers = []
        for pairs in windows:
            parts = [next(scores) for _ in pairs]
            answers.append((sum((s.log_likelihood for s in parts), 0.0), all(s.is_greedy for s in parts)))
        return answers

    def _windows(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], list[int]]]:
        """What to read and what to predict then, in pieces that fit the context.

        A context that is too long loses its first tokens. A continuation that is too long is read in several
        pieces, of which each but the last begins after one token of those before, as lm-eval reads long
        texts.
        """
        context = context or [self.prefix_token_id]  # of a context that was nothing but spaces
        if len(continuation) <= self.max_length:
            return [(context[-(self.max_length + 1 - len(continuation)) :], continuation)]
        return self._rolling(continuation, context[-1])

    def _rolling(self, tokens: list[int], before: int) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(tokens, before, self.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """The score of what is predicted in each of ``pairs`` = (what is read before, what is predicted).

        Pairs that differ in the last token only, such as the choices A, B, C and D, are read once.
        """
        asked = [((*context, *predicted[:-1]), tuple(predicted)) for context, predicted in pairs]
        targets: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for tokens, target in asked:
            targets.setdefault(tokens, []).append(target)
        batches = batches_of([Row(*row) for row in targets.items()], self._batch_tokens)
        scores: dict[tuple[tuple[int, ...], tuple[int, ...]], Score] = {}
        for batch, answers in zip(batches, self._team.do("score", batches), strict=True):
            for row, answer in zip(batch, answers, strict=True):
                scores |= {
                    (row.tokens, target): found for target, found in zip(row.targets, answer, strict=True)
                }
        return [scores[question] for question in asked]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the task's stops."""
        groups: dict[Manner, list[Opening]] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            manner = manner_of(options, self._seed)
            tokens = self.tok_encode(context)[-kept_tokens(manner, self.max_length) :] or [self.eot_token_id]
            groups.setdefault(manner, []).append(Opening(tuple(tokens), number))
        at_once = max(1, self._batch_tokens // self.max_length)  # the cache has room for whole contexts
        pieces = []
        for manner, openings in groups.items():
            openings.sort(key=lambda opening: -len(opening.tokens))
            cuts = range(0, len(openings), at_once)
            pieces += [(openings[first : first + at_once], manner) for first in cuts]
        texts = [""] * len(requests)
        for (openings, _), written in zip(pieces, self._team.do("write", pieces), strict=True):
            for opening, text in zip(openings, written, strict=True):
                texts[opening.number] = text
        return texts


def manner_of(options: dict[str, Any], seed: int) -> Manner:
    """What a task's ``generation_kwargs`` ask for; without a word about it, the likeliest tokens."""
    given = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
    until, length = given.pop("until"), given.pop("max_gen_toks")
    unknown = sorted(given.keys() - KNOWN_OPTIONS)
    if unknown:
        _warn_once(
            f"a task's generation_kwargs {', '.join(unknown)} are left out: there is nothing like it here"
        )
    temperature = float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0
    sampling = Sampling(
        temperature,
        int(given.get("top_k") or 0),
        float(given.get("top_p") or 0.0),
        float(given.get("repetition_penalty") or 1.0),
        int(given.get("no_repeat_ngram_size") or 0),
        seed,
    )
    return Manner(sampling, length, tuple(until))


@cache
def _warn_once(sentence: str) -> None:
    """Log ``sentence`` the first time: it would be said of every request."""
    LOGGER.warning("%s", sentence)
