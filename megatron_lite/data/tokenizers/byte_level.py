"""Bytes as tokens: the id of a byte is its value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from megatron_lite.data.tokenizers.base import END_OF_TEXT, Tokenizer, TokenizerKeys, write_tokenizer_config
from megatron_lite.data.tokenizers.byte_alphabet import CHARACTER_OF_BYTE
from megatron_lite.utils.files import atomic_path

BYTES = 256


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; ids from 256 on are not bytes.

    ``ByteTokenizer`` has 257 ids, the last one ends a document. GPT-NeoX's ``CharLevelTokenizer`` has 512 and
    ends a document with the byte 0.
    """

    def __init__(self, vocab_size: int, eod_id: int) -> None:
        self.vocab_size = vocab_size
        self.eod_id = eod_id

    def encode(self, text: str) -> list[int]:
        """One id a byte."""
        return list(text.encode())

    def _arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return np.frombuffer(b"".join(pieces), np.uint8).astype(np.uint16), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; ids from 256 on are left out."""
        return bytes(index for index in ids if index < BYTES).decode(errors="replace")

    def content(self) -> bytes:
        """Nothing: the sizes say it all."""
        return b""

    def token_bytes(self) -> np.ndarray:
        """1 for a byte, else 0. int64 [vocab_size]."""
        lengths = (np.arange(self.vocab_size) < BYTES).astype(np.int64)
        lengths[self.eod_id] = 0
        return lengths

    def save_pretrained(self, folder: Path) -> None:
        """Write it as a byte-level BPE without merges.

        There, unlike here, the text ``<|endoftext|>`` becomes the end-of-document id.
        """
        vocabulary = {CHARACTER_OF_BYTE[byte]: byte for byte in range(BYTES)}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        if self.eod_id == BYTES:
            library.add_special_tokens([END_OF_TEXT])
        with atomic_path(folder / "tokenizer.json") as temporary:
            library.save(str(temporary))
        write_tokenizer_config(folder, END_OF_TEXT if self.eod_id == BYTES else None)


def load_bytes(keys: TokenizerKeys) -> Tokenizer:
    """``ByteTokenizer``: 256 bytes and an end of document."""
    return ByteTokenizer(vocab_size=BYTES + 1, eod_id=BYTES)


def load_char_level(keys: TokenizerKeys) -> Tokenizer:
    """GPT-NeoX's ``CharLevelTokenizer``: 512 ids, the byte 0 ends a document."""
    return ByteTokenizer(vocab_size=2 * BYTES, eod_id=0)
