"""Tokenizers of the tiktoken library: OpenAI's encodings, by name or from a local ``.tiktoken`` file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import tiktoken
import tiktoken_ext.openai_public as definitions  # type: ignore[import-untyped]
import tokenizers

from megatron_lite.data.tokenizers.base import Tokenizer, TokenizerKeys
from megatron_lite.data.tokenizers.byte_alphabet import CHARACTER_OF_BYTE
from megatron_lite.data.tokenizers.export import save_equal_library
from megatron_lite.utils.errors import DataError

FILE_ENCODINGS = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
"""Encodings whose vocabulary is one ``.tiktoken`` file."""


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding, with its special tokens in text recognised.

    Args:
        encoding: the library's tokenizer.
        pattern: the regular expression that cuts text into words.
        ranks: bytes of each ordinary token → id, which is also the order of merging.
        specials: special token → id.
    """

    def __init__(
        self, encoding: tiktoken.Encoding, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]
    ) -> None:
        self.encoding = encoding
        self._pattern = pattern
        self._ranks = ranks
        self._specials = specials
        self.vocab_size = encoding.n_vocab
        self.eod_id = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """The library's ids."""
        return self.encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, on several threads."""
        return self.encoding.encode_batch(list(texts), allowed_special="all")

    def decode(self, ids: Sequence[int]) -> str:
        """The library's text, special tokens included; ids that stand for nothing are left out."""
        return self.encoding.decode([index for index in ids if index in self._known])

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self._ranks.values()) | frozenset(self._specials.values())

    def content(self) -> bytes:
        """The vocabulary file's lines, the pattern and the special tokens."""
        lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in self._ranks.items())
        return lines + self._pattern.encode() + repr(sorted(self._specials.items())).encode()

    def token_bytes(self) -> np.ndarray:
        """Length of each token's bytes. int64 [vocab_size]."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths

    def save_pretrained(self, folder: Path) -> None:
        """Write it as a byte-level BPE, after a check that the ids are the same."""
        # With the special tokens: so they keep their ids, which need not follow the others'.
        vocabulary = {spelled(token): rank for token, rank in self._ranks.items()} | self._specials
        library = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=vocabulary,
                merges=merges_of(self._ranks),
                ignore_merges=True,
            )
        )
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(plain_pattern(self._pattern)), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens(sorted(self._specials, key=self._specials.__getitem__))
        eod_token = next(name for name, index in self._specials.items() if index == self.eod_id)
        save_equal_library(self, library, folder, eod_token)


def spelled(token: bytes) -> str:
    """``token`` in the alphabet of byte-level vocabularies."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The merges that make each token, in order: its two last parts when only earlier merges are allowed."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merge_below(token, ranks, rank)
            if len(parts) == 2:
                merges.append((spelled(parts[0]), spelled(parts[1])))
    return merges


def merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """``token`` cut into parts by the merges whose rank is below ``limit``."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        candidates = [
            (ranks.get(left + right, limit), index) for index, (left, right) in enumerate(pairwise(parts))
        ]
        best, index = min(candidates)
        if best >= limit:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def plain_pattern(pattern: str) -> str:
    """``pattern`` without possessive quantifiers, and its ``$`` as end of text.

    The tokenizers library's regular expressions read ``{1,3}+`` and ``$`` differently. Dropping possession is
    safe here, since nothing that could take back a character follows; the check on export would tell.
    """
    for quantifier in ("+", "?", "*", "{1,3}"):
        pattern = pattern.replace(quantifier + "+", quantifier)
    return pattern.replace("$", r"\z")


def load_tiktoken(keys: TokenizerKeys) -> Tokenizer:
    """``TiktokenTokenizer``: ``vocab_file`` is an encoding's name or a file like ``cl100k_base.tiktoken``."""
    if keys.vocab_file is None:
        raise DataError(
            f"TiktokenTokenizer needs an encoding: give vocab_file the name of one "
            f"({', '.join(tiktoken.list_encoding_names())}) or of its .tiktoken file"
        )
    name = str(keys.vocab_file)
    path = Path(name)
    if path.is_file():
        definition = definition_from_file(path)
    elif name in tiktoken.list_encoding_names():
        definition = definition_from_network(name)
    else:
        raise DataError(
            f"there is no file {name} and no tiktoken encoding of that name: give vocab_file one of "
            f"{', '.join(tiktoken.list_encoding_names())} or a .tiktoken file"
        )
    encoding = tiktoken.Encoding(**definition)
    return TiktokenTokenizer(
        encoding, definition["pat_str"], definition["mergeable_ranks"], definition["special_tokens"]
    )


def definition_from_network(name: str) -> dict[str, Any]:
    """The library's definition of encoding ``name``, which it downloads unless its cache has it."""
    try:
        return definitions.ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:
        raise DataError(
            f"tiktoken cannot download the encoding {name} ({type(error).__name__}): give vocab_file a local "
            f"{name}.tiktoken instead"
        ) from None


def definition_from_file(path: Path) -> dict[str, Any]:
    """The library's definition of the encoding that ``path`` is named after, with the ranks in the file.

    A ``.tiktoken`` file holds ranks alone; pattern and special tokens are in the library's code. So its
    function runs here with a loader that reads ``path`` in place of the download.
    """
    if path.stem not in FILE_ENCODINGS:
        raise DataError(
            f"{path} does not say which encoding it is: name it after one of {', '.join(FILE_ENCODINGS)}, "
            f"since the file alone does not hold the pattern and the special tokens"
        )
    constructor = definitions.ENCODING_CONSTRUCTORS[path.stem]
    here = FunctionType(
        constructor.__code__,
        {**constructor.__globals__, "load_tiktoken_bpe": lambda *_, **__: read_ranks(path)},
    )
    try:
        definition = here()
        tiktoken.Encoding(**definition)
    except (AssertionError, ValueError):
        raise DataError(f"{path} is not the vocabulary of {path.stem}: download it again") from None
    return definition


def read_ranks(path: Path) -> dict[bytes, int]:
    """The lines ``base64(token) rank`` of a ``.tiktoken`` file. ValueError when a line is not one."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks
