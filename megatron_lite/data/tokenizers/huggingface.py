"""Tokenizers of Hugging Face's tokenizers library: ``tokenizer.json``, and GPT-2's vocabulary and merges.

Byte-level BPE is encoded by gigatoken where it gives the same ids (see :mod:`.fast`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from megatron_lite.data.tokenizers.base import (
    END_OF_TEXT,
    Tokenizer,
    TokenizerKeys,
    read_vocabulary_file,
    write_tokenizer_config,
)
from megatron_lite.data.tokenizers.byte_alphabet import BYTE_OF_CHARACTER
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

if TYPE_CHECKING:
    from megatron_lite.data.tokenizers.fast import FastEncoder

END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""Usual names of the end-of-document token; the first that the vocabulary has is taken."""


class HFTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, with its special tokens in text recognised.

    ``decode`` keeps special tokens, so that decoding gives back what was encoded.

    Args:
        library: the tokenizer.
        eod_token: the token that ends a document.
    """

    def __init__(self, library: tokenizers.Tokenizer, eod_token: str) -> None:
        self.library = library
        self.eod_token = eod_token
        eod_id = library.token_to_id(eod_token)
        assert eod_id is not None, f"the vocabulary has no {eod_token}"
        self.eod_id = eod_id
        self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """The library's ids, with the special tokens that its post-processor adds."""
        return self.library.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, on all cores."""
        return [encoding.ids for encoding in self.library.encode_batch(list(texts))]

    def encode_arrays(
        self, texts: Sequence[str], reference: bool = False, ended: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As any tokenizer's; by gigatoken, if it can and ``reference`` is not set; see :mod:`.fast`."""
        if reference or self._fast is None:
            return super().encode_arrays(texts, reference, ended)
        return self._fast.encode_arrays(texts, ended)

    @cached_property
    def _fast(self) -> FastEncoder | None:
        # Imported when text is encoded in bulk: a training run does not wait for it.
        from megatron_lite.data.tokenizers.fast import fast_encoder

        return fast_encoder(self.library, self._definition, self.eod_token)

    def decode(self, ids: Sequence[int]) -> str:
        """The library's text, special tokens included."""
        return self.library.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _definition(self) -> str:
        return self.library.to_str()

    def content(self) -> bytes:
        """The tokenizer.json."""
        return self._definition.encode()

    def token_bytes(self) -> np.ndarray:
        """From the spelling of each token in the vocabulary and the kind of decoder. int64 [vocab_size]."""
        lengths = np.zeros(self.vocab_size, np.int64)
        byte_level = "ByteLevel" in self._decoder_kinds
        for token, index in self.library.get_vocab(with_added_tokens=False).items():
            lengths[index] = spelled_bytes(token, byte_level)
        for index, added in self.library.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    @cached_property
    def _decoder_kinds(self) -> set[str]:
        decoder: dict[str, Any] = json.loads(self._definition)["decoder"] or {}
        return {decoder.get("type", "")} | {part["type"] for part in decoder.get("decoders", [])}

    def save_pretrained(self, folder: Path) -> None:
        """Write ``tokenizer.json`` as it is and its ``tokenizer_config.json``."""
        with atomic_path(folder / "tokenizer.json") as temporary:
            self.library.save(str(temporary))
        write_tokenizer_config(folder, self.eod_token)


def spelled_bytes(token: str, byte_level: bool) -> int:
    """UTF-8 bytes of text that a vocabulary's ``token`` stands for.

    Byte-level vocabularies spell each byte as one character; others spell a space as ``▁`` and a lone byte as
    ``<0x0A>``.
    """
    if byte_level and all(character in BYTE_OF_CHARACTER for character in token):
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())


def load_hf(keys: TokenizerKeys) -> Tokenizer:
    """``HFTokenizer``: ``vocab_file`` is a tokenizer.json, or a folder with one."""
    path = read_vocabulary_file("HFTokenizer", "vocab_file", keys.vocab_file)
    library, path = read_library(path)
    return HFTokenizer(library, end_token(library, path))


def read_library(path: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """The tokenizer in ``path``, a tokenizer.json or its folder, and that file. Raises DataError if none.

    It neither cuts nor pads, whatever the file says: whoever saved it may have had batches of one length.
    """
    if path.is_dir():
        path = read_vocabulary_file("HFTokenizer", "vocab_file", path / "tokenizer.json")
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            f"{path} is not a tokenizer.json of the tokenizers library ({error}): correct vocab_file"
        ) from None
    library.no_truncation()
    library.no_padding()
    return library, path


def end_token(library: tokenizers.Tokenizer, path: Path) -> str:
    """The end-of-document token: what tokenizer_config.json beside ``path`` says, else by the usual names."""
    token = named_token(path.with_name("tokenizer_config.json"), "eos_token")
    if token is not None and library.token_to_id(token) is not None:
        return token
    for token in END_TOKENS:
        if library.token_to_id(token) is not None:
            return token
    raise DataError(
        f"{path} has no token that ends a document (looked for {', '.join(END_TOKENS)}): add {END_OF_TEXT} "
        "to its vocabulary, or put a tokenizer_config.json with eos_token beside it"
    )


def named_token(config: Path, name: str) -> str | None:
    """The token that ``config``, a tokenizer_config.json, has for ``name``, e.g. ``eos_token``; None if none.

    Raises:
        DataError: the file is damaged.
    """
    named = read_tokenizer_config(config).get(name)
    return named.get("content") if isinstance(named, dict) else named


def read_tokenizer_config(config: Path) -> dict[str, Any]:
    """The content of ``config``, empty if there is no such file.

    Raises:
        DataError: it is not a JSON object.
    """
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_bytes())
    except ValueError as error:
        raise DataError(f"{config} cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{config} is not a JSON object: fetch it again")
    return content


def load_gpt2(keys: TokenizerKeys) -> Tokenizer:
    """``GPT2BPETokenizer``: ``vocab_file`` is GPT-2's vocab.json, ``merge_file`` its merges.txt."""
    vocab = read_vocabulary_file("GPT2BPETokenizer", "vocab_file", keys.vocab_file)
    merges = read_vocabulary_file("GPT2BPETokenizer", "merge_file", keys.merge_file)
    try:
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            f"{vocab} and {merges} are not a BPE vocabulary and its merges ({error}): correct vocab_file "
            "and merge_file"
        ) from None
    library = tokenizers.Tokenizer(model)
    if library.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"{vocab} has no token {END_OF_TEXT}: give a vocabulary of GPT-2's kind")
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return HFTokenizer(library, END_OF_TEXT)
