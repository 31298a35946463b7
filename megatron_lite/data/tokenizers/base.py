"""What every tokenizer is."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import write_text

END_OF_TEXT = "<|endoftext|>"
"""The token between documents in vocabularies that are made here (GPT-2's and GPT-Neo's name)."""

PADDING = "<|padding|>"
"""The padding token in vocabularies that are made here (GPT-Neo's name)."""


class TokenizerKeys(Protocol):
    """The configuration's keys that name a tokenizer; ``config.data`` has them."""

    @property
    def tokenizer_type(self) -> str:
        """Name in the registry, e.g. ``HFTokenizer``; upper and lower case are the same."""

    @property
    def vocab_file(self) -> str | Path | None:
        """The vocabulary, in the format of the type."""

    @property
    def merge_file(self) -> str | Path | None:
        """GPT-2's merges.txt."""


class Tokenizer(ABC):
    """Text ↔ token ids 0 … ``vocab_size`` - 1.

    Attributes:
        vocab_size: number of ids.
        eod_id: the id that ends a document.
    """

    vocab_size: int
    eod_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end-of-document token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""

    @abstractmethod
    def content(self) -> bytes:
        """Everything the ids depend on, as bytes."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for; 0 for special tokens. int64 [vocab_size]."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers' AutoTokenizer.

        Raises:
            DataError: that format cannot express this tokenizer.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(
        self, texts: Sequence[str], reference: bool = False, ended: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts laid end to end ([total]) and how many each has (int64 [texts]).

        Args:
            texts: the texts.
            reference: take the tokenizer's own library, not the fastest way there is.
            ended: put the end-of-document token after each text.

        Returns:
            The same ids as ``encode_batch``'s, in integers that hold any id, and the lengths.
        """
        tokens, lengths = self._arrays(texts)
        return with_token_after_each(tokens, lengths, self.eod_id) if ended else (tokens, lengths)

    def _arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        batch = self.encode_batch(texts)
        lengths = np.fromiter(map(len, batch), np.int64, len(batch))
        return np.fromiter(chain.from_iterable(batch), np.int64, int(lengths.sum())), lengths

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that differ when any id could."""
        digest = hashlib.blake2b(self.content(), digest_size=16)
        digest.update(f"{type(self).__name__} {self.vocab_size} {self.eod_id}".encode())
        return digest.hexdigest()

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        return self.token_bytes()

    def bytes_of(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of text in ``ids`` (integers of any shape): what bits per byte divides by.

        Ids of the padding between ``vocab_size`` and the model's padded vocabulary count as 0.
        """
        flat = np.asarray(ids).reshape(-1)
        return int(self._token_bytes[flat[flat < self.vocab_size]].sum())


def with_token_after_each(
    tokens: np.ndarray, lengths: np.ndarray, token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents laid end to end (``tokens`` [total], ``lengths`` [documents]) with ``token`` after each."""
    return np.insert(tokens, np.cumsum(lengths), token), lengths + 1


def read_vocabulary_file(tokenizer_type: str, key: str, path: str | Path | None) -> Path:
    """``path`` as a :class:`Path`, if it is there.

    Raises:
        DataError: the key is not given or the file does not exist.
    """
    if path is None:
        raise DataError(f"{tokenizer_type} needs a vocabulary: give the file in the key {key}")
    if not Path(path).exists():
        raise DataError(f"there is no file {path}: correct the key {key}")
    return Path(path)


def write_tokenizer_config(folder: Path, eod_token: str | None) -> None:
    """Write the ``tokenizer_config.json`` that goes beside a ``tokenizer.json``.

    The end-of-document token is the beginning too: models trained here see nothing else before a document.
    """
    keys: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if eod_token is not None:
        keys |= {"eos_token": eod_token, "bos_token": eod_token}
    write_text(folder / "tokenizer_config.json", json.dumps(keys, indent=2) + "\n")
