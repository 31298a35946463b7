"""Chinese text cut into words by jieba before it is encoded, as by the tokenizers of CPM and Chinese GPT-3.

Chinese writes no spaces between words; cut beforehand, no token reaches across two words. Two kinds of
vocabulary (both can be made by tools/train_tokenizer.py ``--jieba``):

- a sentencepiece model, CPM's way: words are joined by spaces, the spaces and line breaks of the text itself
  having become ``▂`` and ``▃``. So text that has these two characters comes back with spaces and line breaks;
- a tokenizer.json, Chinese GPT-3's way: each word is encoded alone, and nothing is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import jieba
import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from megatron_lite.data.tokenizers.base import Tokenizer, TokenizerKeys, read_vocabulary_file
from megatron_lite.data.tokenizers.huggingface import HFTokenizer, end_token, read_library
from megatron_lite.data.tokenizers.sentence_piece import SentencePieceTokenizer, end_id, read_processor
from megatron_lite.utils.errors import DataError

SPACE, LINE_BREAK = "▂", "▃"
"""What CPM writes in place of a space and a line break."""

REPLACED = str.maketrans(" \n", SPACE + LINE_BREAK)
RESTORED = str.maketrans(SPACE + LINE_BREAK, " \n", " ▁")
"""And back; spaces (sentencepiece's are ``▁``) only divide words."""


@cache
def dictionary() -> jieba.Tokenizer:
    """jieba with its own dictionary (0.5 s once), without the cache file that it would share in /tmp."""
    words = jieba.Tokenizer()
    words.FREQ, words.total = words.gen_pfdict(words.get_dict_file())
    words.initialized = True
    return words


class WordCutter:
    """Cuts text into words, signs and spaces; joined, they are the text. ``specials`` stay whole."""

    def __init__(self, specials: Iterable[str] = ()) -> None:
        longest_first = sorted(specials, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def __call__(self, text: str) -> list[str]:
        """The words of ``text``."""
        if self._specials is None:
            return list(dictionary().cut(text))
        words: list[str] = []
        for number, part in enumerate(self._specials.split(text)):
            words += [part] if number % 2 else dictionary().cut(part)
        return words

    def spaced(self, text: str) -> str:
        """The words with spaces between, the text's own spaces and line breaks replaced, as CPM does."""
        return " ".join([word.translate(REPLACED) for word in self(text)])


class JiebaSentencePieceTokenizer(SentencePieceTokenizer):
    """CPM's: a sentencepiece model over :meth:`WordCutter.spaced`.

    Args:
        processor: the loaded model.
        eod_id: the id that ends a document.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, eod_id: int) -> None:
        super().__init__(processor, eod_id)
        proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        symbols = {piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED}
        self._cut = WordCutter(symbols - {SPACE, LINE_BREAK})

    def encode(self, text: str) -> list[int]:
        """The ids of the text's words."""
        return super().encode(self._cut.spaced(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts."""
        return super().encode_batch([self._cut.spaced(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """The text, its spaces and line breaks put back."""
        return super().decode(ids).translate(RESTORED)

    def content(self) -> bytes:
        """The model file and the version of jieba, whose dictionary cuts the words."""
        return super().content() + jieba.__version__.encode()

    def token_bytes(self) -> np.ndarray:
        """From each piece's spelling; the spaces between words are none of the text. int64 [vocab_size]."""
        lengths = super().token_bytes()
        for index in np.flatnonzero(lengths).tolist():
            if not self.processor.is_byte(index):
                lengths[index] = len(self.processor.id_to_piece(index).translate(RESTORED).encode())
        return lengths

    def save_pretrained(self, folder: Path) -> None:
        """Raises DataError: a tokenizer.json cannot cut words by a dictionary."""
        raise not_in_a_json(self)


class JiebaHFTokenizer(HFTokenizer):
    """Chinese GPT-3's: a tokenizer.json that encodes each word alone.

    Args:
        library: the tokenizer.
        eod_token: the token that ends a document.
    """

    def __init__(self, library: tokenizers.Tokenizer, eod_token: str) -> None:
        super().__init__(library, eod_token)
        self._cut = WordCutter(token.content for token in library.get_added_tokens_decoder().values())

    def encode(self, text: str) -> list[int]:
        """The ids of the text's words."""
        return self.library.encode(self._cut(text), is_pretokenized=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts."""
        words = [self._cut(text) for text in texts]
        return [encoding.ids for encoding in self.library.encode_batch(words, is_pretokenized=True)]

    def encode_arrays(
        self, texts: Sequence[str], reference: bool = False, ended: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As any tokenizer's; gigatoken does not take words."""
        return Tokenizer.encode_arrays(self, texts, reference, ended)

    def content(self) -> bytes:
        """The tokenizer.json and the version of jieba, whose dictionary cuts the words."""
        return super().content() + jieba.__version__.encode()

    def save_pretrained(self, folder: Path) -> None:
        """Raises DataError: a tokenizer.json cannot cut words by a dictionary."""
        raise not_in_a_json(self)


def not_in_a_json(tokenizer: Tokenizer) -> DataError:
    """Why a tokenizer with jieba cannot be exported."""
    return DataError(
        f"this {type(tokenizer).__name__} cannot be written as a tokenizer.json, which cannot cut words by "
        "jieba's dictionary: copy the vocabulary file itself beside the exported weights"
    )


def load_jieba(keys: TokenizerKeys) -> Tokenizer:
    """``JiebaTokenizer``: ``vocab_file`` is a sentencepiece model, or a tokenizer.json (or its folder)."""
    path = read_vocabulary_file("JiebaTokenizer", "vocab_file", keys.vocab_file)
    if path.is_dir() or path.suffix == ".json":
        library, path = read_library(path)
        return JiebaHFTokenizer(library, end_token(library, path))
    processor = read_processor(path)
    return JiebaSentencePieceTokenizer(processor, end_id(processor, path))
