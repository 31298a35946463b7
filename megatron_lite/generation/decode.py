"""Tokens after tokens: the model is asked for one more until each row has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_lite.generation.sampling import Sampler
from megatron_lite.model import GPT, KVCache
from megatron_lite.parallel.collectives import gathered

PREFILL_CHUNK = 256
"""Prompt tokens read at a time: bounds the memory of the logits of a long prompt, which nobody looks at."""


@torch.inference_mode()
def generate_tokens(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    max_new_tokens: int,
    eod_id: int,
    vocab_size: int,
    recompute: bool = False,
) -> Iterator[list[int | None]]:
    """Continue each of ``prompts`` (one token at least); yields the next token of every row, step by step.

    A row that has ended (its last token was ``eod_id``) gives None. Ends after ``max_new_tokens`` steps, or
    when all rows have. Ids from ``vocab_size`` on, which pad the vocabulary, are never chosen. Rows do not
    influence each other: shorter ones are padded on the left and the padding is masked. Ranks that share the
    model call this together and get the same tokens.

    A text longer than the model's context (``max_position_embeddings``) goes on with its last tokens, see
    :func:`context_start`.

    Args:
        recompute: read the whole context for every token instead of keeping keys and values: as slow as it
            sounds, and the yardstick of the cache.
    """
    limit = gpt.config.max_position_embeddings
    histories = [list(prompt) for prompt in prompts]
    ended = [False] * len(histories)
    cache: KVCache | None = None
    starts: list[int] = []
    for _ in range(max_new_tokens):
        moved = [context_start(len(history), limit) for history in histories]
        if cache is None or recompute or moved != starts or cache.length == cache.max_length:
            starts = moved
            contexts = [
                history[-1:] if over else history[start:]
                for history, start, over in zip(histories, starts, ended, strict=True)
            ]
            cache, logits = read_contexts(gpt, contexts, eod_id, limit)
        else:
            last = torch.tensor([[history[-1]] for history in histories], device=cache.device)
            logits = gpt(last, cache)[:, -1]
        whole = gathered(logits, gpt.tensor.axis) if gpt.tensor.size > 1 else logits
        chosen = sampler(whole[:, :vocab_size], histories).tolist()
        step: list[int | None] = []
        for row, token in enumerate(chosen):
            step.append(None if ended[row] else token)
            if not ended[row]:
                histories[row].append(token)
                ended[row] = token == eod_id
        yield step
        if all(ended):
            return


def context_start(length: int, limit: int) -> int:
    """Where the context of a text of ``length`` tokens begins: 0 up to ``limit``, then on by half of it.

    Moving by halves means that the cache is refilled once in limit/2 tokens. It depends on the text's own
    length only, so that a batch gives what one by one does.
    """
    half = max(1, limit // 2)
    return 0 if length <= limit else -(-(length - limit) // half) * half


def read_contexts(
    gpt: GPT, contexts: Sequence[Sequence[int]], padding_id: int, limit: int
) -> tuple[KVCache, torch.Tensor]:
    """A cache for ``limit`` tokens filled with ``contexts``, padded on the left, and its logits [b, v]."""
    width = max(len(context) for context in contexts)
    padding = [width - len(context) for context in contexts]
    starts = torch.tensor(padding) if any(padding) else None
    cache = gpt.new_cache(len(contexts), limit, starts)
    rows = [[padding_id] * pad + list(context) for pad, context in zip(padding, contexts, strict=True)]
    for chunk in torch.tensor(rows, device=cache.device).split(PREFILL_CHUNK, dim=1):
        logits = gpt(chunk, cache)
    return cache, logits[:, -1]
