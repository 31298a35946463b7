"""Characters as tokens; the vocabulary is a JSON file: ``{"\\n": 0, " ": 1, …, "<|endoftext|>": 65}``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from megatron_lite.data.tokenizers.base import (
    END_OF_TEXT,
    Tokenizer,
    TokenizerKeys,
    read_vocabulary_file,
    write_tokenizer_config,
)
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path, write_text


class CharacterTokenizer(Tokenizer):
    """One id a character.

    Args:
        path: the JSON file, for messages.
        ids: character → id; ``<|endoftext|>`` → the end-of-document id.
    """

    def __init__(self, path: Path, ids: dict[str, int]) -> None:
        self._path = path
        self._ids = ids
        self._characters = {index: character for character, index in ids.items() if character != END_OF_TEXT}
        self.vocab_size = len(ids)
        self.eod_id = ids[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """One id a character.

        Raises:
            DataError: a character is not in the vocabulary.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the vocabulary "
                f"{self._path}: make a vocabulary from all the text with tools/train_tokenizer.py, or use "
                "ByteTokenizer"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The characters; the end of a document is written ``<|endoftext|>``."""
        return "".join(
            self._characters.get(index, END_OF_TEXT if index == self.eod_id else "�") for index in ids
        )

    def content(self) -> bytes:
        """The vocabulary."""
        return json.dumps(self._ids, sort_keys=True).encode()

    def token_bytes(self) -> np.ndarray:
        """Bytes of each character in UTF-8. int64 [vocab_size]."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for index, character in self._characters.items():
            lengths[index] = len(character.encode())
        return lengths

    def save_pretrained(self, folder: Path) -> None:
        """Write it as a BPE over characters without merges; there, unknown characters are dropped."""
        vocabulary = {character: index for index, character in self._characters.items()}
        library = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab={**vocabulary, END_OF_TEXT: self.eod_id}, merges=[])
        )
        library.decoder = tokenizers.decoders.Fuse()
        library.add_special_tokens([END_OF_TEXT])
        with atomic_path(folder / "tokenizer.json") as temporary:
            library.save(str(temporary))
        write_tokenizer_config(folder, END_OF_TEXT)


def write_character_vocabulary(texts: Iterable[str], path: Path) -> int:
    """Write the vocabulary of every character in ``texts``, in code-point order; returns its size.

    Raises:
        DataError: there is no character.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise DataError("the input holds no text to take characters from: give text that is not empty")
    vocabulary = {character: index for index, character in enumerate(sorted(characters))}
    vocabulary[END_OF_TEXT] = len(vocabulary)
    write_text(path, json.dumps(vocabulary, ensure_ascii=False) + "\n")
    return len(vocabulary)


def load_characters(keys: TokenizerKeys) -> Tokenizer:
    """``CharacterTokenizer``: ``vocab_file`` is the JSON file."""
    path = read_vocabulary_file("CharacterTokenizer", "vocab_file", keys.vocab_file)
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        ids = None
    if (
        not isinstance(ids, dict)
        or END_OF_TEXT not in ids
        or sorted(ids.values()) != list(range(len(ids)))
        or any(len(character) != 1 for character in ids if character != END_OF_TEXT)
    ):
        raise DataError(
            f"{path} is not a vocabulary of characters (JSON: each character and {END_OF_TEXT} → an id "
            "from 0 on): make one with tools/train_tokenizer.py"
        )
    return CharacterTokenizer(path, ids)
