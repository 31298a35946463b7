"""Loss, perplexity and bits per byte of a text, read as training's evaluation reads its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megatron_lite.data.batches import micro_batch
from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.evaluation.scoring import predictions, read
from megatron_lite.generation import TextModel
from megatron_lite.model.places import places_of
from megatron_lite.parallel.team import Team
from megatron_lite.utils.errors import DataError


@dataclass(frozen=True)
class TextFigures:
    """How well a model predicts a text.

    Attributes:
        documents: of the text.
        bytes: of the UTF-8 of what was predicted: all but the first token.
        tokens: that were predicted, the ends of documents among them.
        loss: mean of them, in nats.
        perplexity: of a token.
        bits_per_byte: of all predictions together.
    """

    documents: int
    bytes: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.documents} documents, {self.bytes} bytes, {self.tokens} tokens:  loss {self.loss:.4f}  "
            f"perplexity {self.perplexity:.4g}  bits/byte {self.bits_per_byte:.4f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def text_figures(
    model: TextModel, team: Team, inputs: Sequence[str], key: str, batch_tokens: int
) -> TextFigures:
    """The figures of ``inputs``: files of text, JSONL (the text under ``key``) or what else training reads.

    The documents, each followed by the end-of-document token, are one stream, and are read in windows of
    ``seq_length`` as training's are. All but the first token of the stream are predicted, once each.

    Raises:
        DataError: an input is missing or damaged, or holds no text.
    """
    texts = list(read_texts(inputs, [key]))
    stream, _ = model.tokenizer.encode_arrays(texts, ended=True)
    if len(stream) < 2:
        raise DataError(f"{', '.join(inputs)}: there is no text to evaluate")
    length = model.config.model.seq_length
    starts = range(0, len(stream) - 1, length)
    windows = [stream[start : start + length + 1].astype(np.int64) for start in starts]
    whole = len(windows) - (len(windows[-1]) <= length)
    size = max(1, batch_tokens // length)
    batches = [windows[first : min(first + size, whole)] for first in range(0, whole, size)]
    batches += [windows[whole:]] if whole < len(windows) else []
    sums = team.do("read", batches)
    nats, count = (math.fsum(column) for column in zip(*sums, strict=True))
    predicted = sum(len(text.encode()) for text in texts) - model.tokenizer.bytes_of(stream[:1])
    loss = nats / max(count, 1.0)
    # Tokens that are masked (eod_mask_loss) are taken to cost as much as the others, as in training's figure.
    bits = loss * (len(stream) - 1) / math.log(2) / max(predicted, 1)
    return TextFigures(len(texts), predicted, int(count), loss, math.exp(min(loss, 700.0)), bits)


@dataclass(frozen=True)
class Windows:
    """Windows of one length in the place of a data set."""

    rows: Sequence[np.ndarray]

    @property
    def samples_per_epoch(self) -> int:
        """How many they are."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens in them."""
        return sum(map(len, self.rows))

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.rows[sample]


@torch.inference_mode()
def read_windows(model: TextModel, rows: Sequence[np.ndarray]) -> tuple[float, float]:
    """(sum of the loss in nats, number of tokens) of the windows ``rows``, which are of one length."""
    keys, eod, gpt = model.config.data, model.tokenizer.eod_id, model.gpt
    device = next(gpt.parameters()).device
    masked = eod if keys.eod_mask_loss else None
    ended = eod if keys.reset_attention_mask else None
    batch = micro_batch(Windows(rows), 0, len(rows), device, masked, ended)
    length = batch.tokens.shape[1]
    places = places_of(batch.starts, length, device, reset_positions=keys.reset_position_ids)
    losses, _ = predictions(gpt, read(gpt, batch.tokens, places).flatten(0, 1), batch.labels.flatten())
    counted = torch.ones_like(losses) if batch.loss_mask is None else batch.loss_mask.flatten()
    return float((losses.double() * counted).sum()), float(counted.sum())
