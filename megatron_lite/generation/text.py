"""From prompts to samples, in text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lite.generation.decode import generate_tokens
from megatron_lite.generation.load import TextModel
from megatron_lite.generation.sampling import Sampler, Sampling
from megatron_lite.generation.stream import TextStream
from megatron_lite.utils.log import LOGGER


@dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
        prompt: the text that was continued; empty for a text from nothing.
        text: what the model wrote, without the prompt and without the end-of-document token.
        tokens: how many tokens it took, the end-of-document token included.
        finished: whether the model ended the document; otherwise the number of tokens did.
    """

    prompt: str
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Row:
    """One sample to write: its number among all, which seeds its draws, its prompt, and the prompt's ids."""

    number: int
    prompt: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Samples that are written side by side."""

    rows: tuple[Row, ...]
    sampling: Sampling
    max_new_tokens: int


def generate(
    model: TextModel,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    num_samples: int = 1,
    batch_size: int = 8,
) -> Iterator[Sample]:
    """``num_samples`` continuations of each of ``prompts``, in their order, ``batch_size`` at a time.

    An empty prompt begins a document. A prompt longer than the model's context keeps its last tokens, which
    is logged. The samples depend on the seed and on their number, not on ``batch_size``.
    """
    for batch in batches_of(model, prompts, sampling, max_new_tokens, num_samples, batch_size):
        yield from write_batch(model, batch)


def batches_of(
    model: TextModel,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    num_samples: int,
    batch_size: int,
) -> list[Batch]:
    """What :func:`generate` writes, batch by batch."""
    encoded = [tuple(encode_prompt(model, prompt)) for prompt in prompts]
    rows = [
        Row(number, prompts[number // num_samples], encoded[number // num_samples])
        for number in range(len(prompts) * num_samples)
    ]
    return [
        Batch(tuple(rows[first : first + batch_size]), sampling, max_new_tokens)
        for first in range(0, len(rows), batch_size)
    ]


def write_batch(model: TextModel, batch: Batch) -> list[Sample]:
    """The samples of ``batch``."""
    sampler = Sampler(batch.sampling, [row.number for row in batch.rows])
    written: list[list[int]] = [[] for _ in batch.rows]
    for step in steps_of(model, [row.ids for row in batch.rows], sampler, batch.max_new_tokens):
        for tokens, token in zip(written, step, strict=True):
            if token is not None:
                tokens.append(token)
    return [_sample(model, row, tokens) for row, tokens in zip(batch.rows, written, strict=True)]


def stream(model: TextModel, prompt: str, sampling: Sampling, max_new_tokens: int) -> Iterator[str]:
    """The continuation of one ``prompt`` in pieces, as soon as each is known; characters come whole.

    Joined, the pieces are the text of :func:`generate`'s first sample.
    """
    ids = encode_prompt(model, prompt)
    pieces = TextStream(model.tokenizer, ids if prompt else [])
    for (token,) in steps_of(model, [ids], Sampler(sampling, [0]), max_new_tokens):
        assert token is not None, "a single row ends with the last step"
        if token != model.tokenizer.eod_id:
            yield pieces.add(token)
    yield pieces.finish()


def encode_prompt(model: TextModel, prompt: str) -> list[int]:
    """The ids to read: those of ``prompt``, or of the end-of-document token, which precedes every text."""
    ids = model.tokenizer.encode(prompt) or [model.tokenizer.eod_id]
    limit = model.config.model.max_position_embeddings
    if len(ids) > limit:
        LOGGER.warning(
            "a prompt has %d tokens and the model reads %d: only its last %d count", len(ids), limit, limit
        )
    return ids[-limit:]


def steps_of(
    model: TextModel, prompts: Sequence[Sequence[int]], sampler: Sampler, max_new_tokens: int
) -> Iterator[list[int | None]]:
    """:func:`~megatron_lite.generation.decode.generate_tokens` of ``model``, as its configuration has it."""
    return generate_tokens(
        model.gpt, prompts, sampler, max_new_tokens, model.tokenizer.eod_id, model.tokenizer.vocab_size,
        model.config.generation.recompute,
    )  # fmt: skip


def _sample(model: TextModel, row: Row, tokens: list[int]) -> Sample:
    finished = tokens[-1:] == [model.tokenizer.eod_id]
    pieces = TextStream(model.tokenizer, row.ids if row.prompt else [])
    text = "".join(pieces.add(token) for token in (tokens[:-1] if finished else tokens)) + pieces.finish()
    return Sample(row.prompt, text, len(tokens), finished)
