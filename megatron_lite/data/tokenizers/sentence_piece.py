"""Tokenizers of the sentencepiece library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_lite.data.tokenizers.base import END_OF_TEXT, Tokenizer, TokenizerKeys, read_vocabulary_file
from megatron_lite.utils.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Args:
        processor: the loaded model.
        eod_id: the id that ends a document.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, eod_id: int) -> None:
        self.processor = processor
        self.eod_id = eod_id
        self.vocab_size = processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The library's ids, without beginning and end."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts."""
        return self.processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The library's text."""
        return self.processor.decode(list(ids))

    def content(self) -> bytes:
        """The model file."""
        return self.processor.serialized_model_proto()

    def token_bytes(self) -> np.ndarray:
        """From each piece's spelling; unknown and control pieces count 0. int64 [vocab_size].

        The space that the model may put before a text counts, so a text may count one byte more than it has.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        for index in range(self.vocab_size):
            if self.processor.is_byte(index):
                lengths[index] = 1
            elif not (self.processor.is_control(index) or self.processor.is_unknown(index)):
                lengths[index] = len(self.processor.id_to_piece(index).replace("▁", " ").encode())
        return lengths

    def save_pretrained(self, folder: Path) -> None:
        """Refuse: see the message."""
        raise DataError(
            "a sentencepiece model cannot be written as a tokenizer.json that is sure to give the same ids: copy the model file "
            "beside the exported weights"
        )


def load_sentencepiece(keys: TokenizerKeys) -> Tokenizer:
    """``SPMTokenizer``: ``vocab_file`` is the .model file; ``<|endoftext|>`` or else ``</s>`` ends a document."""
    path = read_vocabulary_file("SPMTokenizer", "vocab_file", keys.vocab_file)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise DataError(f"{path} is not a sentencepiece model: correct vocab_file") from None
    eod_id = processor.piece_to_id(END_OF_TEXT)
    if eod_id == processor.unk_id():
        eod_id = processor.eos_id()
    if eod_id < 0:
        raise DataError(f"{path} has neither {END_OF_TEXT} nor an end-of-sentence piece: train one that has")
    return SentencePieceTokenizer(processor, eod_id)
