"""What the model writes after texts, up to what is to stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.generation import Sampling, TextModel
from megatron_lite.generation.sampling import Sampler
from megatron_lite.generation.stream import TextStream
from megatron_lite.generation.text import steps_of


@dataclass(frozen=True)
class Manner:
    """How to continue a text.

    Attributes:
        sampling: how each token is chosen.
        max_new_tokens: how many at most.
        until: texts that end the continuation and are no part of it.
    """

    sampling: Sampling
    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opening:
    """A text to continue: its tokens, one at least, and its number among all, which seeds its draws."""

    tokens: tuple[int, ...]
    number: int


def kept_tokens(manner: Manner, limit: int) -> int:
    """How many tokens of a text the model reads, so that the continuation has room in its context too.

    A continuation as long as the context leaves half of it to the text, and goes on with its last tokens as
    :func:`megatron_lite.generation.decode.context_start` has it.
    """
    return limit - manner.max_new_tokens if manner.max_new_tokens < limit else max(1, limit // 2)


def write(model: TextModel, openings: Sequence[Opening], manner: Manner) -> list[str]:
    """The continuation of each of ``openings``, which are one batch; a text that is stopped costs nothing
    but its place until the last one is."""
    streams = [_Continuation(model, opening, manner.until) for opening in openings]
    sampler = Sampler(manner.sampling, [opening.number for opening in openings])
    prompts = [opening.tokens for opening in openings]
    for step in steps_of(model, prompts, sampler, manner.max_new_tokens):
        for stream, token in zip(streams, step, strict=True):
            stream.add(token)
        if all(stream.stopped for stream in streams):
            break
    return [stream.text() for stream in streams]


class _Continuation:
    """The text of one row as it comes."""

    def __init__(self, model: TextModel, opening: Opening, until: Sequence[str]) -> None:
        self.stopped = False
        self._end = model.tokenizer.eod_id
        begins = opening.tokens == (self._end,)  # nothing stands before the text
        self._stream = TextStream(model.tokenizer, () if begins else opening.tokens)
        self._until = [stop for stop in until if stop]
        self._text = ""

    def add(self, token: int | None) -> None:
        """Take the row's next token."""
        if self.stopped:
            return
        if token is None or token == self._end:
            self.stopped = True
            return
        self._text += self._stream.add(token)
        self.stopped = any(stop in self._text for stop in self._until)

    def text(self) -> str:
        """All of it, before the first stop."""
        whole = self._text + self._stream.finish()
        return whole[: min((whole.find(stop) for stop in self._until if stop in whole), default=len(whole))]
