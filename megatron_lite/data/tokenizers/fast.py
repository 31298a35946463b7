"""gigatoken: byte-level BPE many times faster than the tokenizers library, used where the ids are equal."""

from __future__ import annotations

from collections.abc import Sequence

import awkward  # type: ignore[import-untyped]
import gigatoken
import numpy as np
import tokenizers

from megatron_lite.data.tokenizers.export import PROBES
from megatron_lite.utils.errors import DataError

SAMPLE_CHARACTERS = 1024
"""Of every batch, a document (so much of it) is encoded by the tokenizers library too, and compared."""


class FastEncoder:
    """The ids of ``library`` by gigatoken, compared with the library's own on a sample of each batch."""

    def __init__(self, library: tokenizers.Tokenizer, fast: gigatoken.Tokenizer) -> None:
        self._library = library
        self._fast = fast

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Tokenizer.encode_arrays`.

        Raises:
            DataError: the two libraries give different ids for the sample.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        ids = self._fast.encode_batch(list(texts))
        tokens, lengths = np.asarray(awkward.flatten(ids, axis=1)), np.asarray(awkward.num(ids, axis=1))
        self._compare(texts, tokens, lengths)
        return tokens, lengths

    def _compare(self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        # A document that differs from batch to batch, without a generator whose state would be kept.
        index = len(tokens) % len(texts)
        text = texts[index]
        if len(text) <= SAMPLE_CHARACTERS:
            end = int(lengths[: index + 1].sum())
            ids = tokens[end - int(lengths[index]) : end].tolist()
        else:
            text = text[:SAMPLE_CHARACTERS]
            ids = self._fast.encode(text).tolist()
        if ids != self._library.encode(text).ids:
            raise DataError(
                f"gigatoken and the tokenizers library give different ids for text that begins with "
                f"{text[:40]!r}: preprocess with --encoder reference, and report the text to gigatoken"
            )


def fast_encoder(library: tokenizers.Tokenizer) -> FastEncoder | None:
    """A fast encoder for ``library``; None if gigatoken does not know its kind or gives other ids."""
    try:
        fast = gigatoken.Tokenizer(library)
    except Exception:  # whatever gigatoken raises, the tokenizers library can do it
        return None
    added = "".join(token.content + " x" for token in library.get_added_tokens_decoder().values())
    equal = all(fast.encode(probe).tolist() == library.encode(probe).ids for probe in (*PROBES, added, ""))
    return FastEncoder(library, fast) if equal else None
