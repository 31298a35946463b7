"""Tokenizers by name. The names are GPT-NeoX's where it has one. A new one: a file and a line in REGISTRY."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

from megatron_lite.data.tokenizers.base import END_OF_TEXT, PADDING, Tokenizer, TokenizerKeys
from megatron_lite.utils.errors import DataError

__all__ = ["END_OF_TEXT", "PADDING", "REGISTRY", "Tokenizer", "TokenizerKeys", "load_tokenizer"]

REGISTRY: dict[str, str] = {
    "HFTokenizer": "huggingface:load_hf",
    "GPT2BPETokenizer": "huggingface:load_gpt2",
    "SPMTokenizer": "sentence_piece:load_sentencepiece",
    "JiebaTokenizer": "jieba_words:load_jieba",
    "TiktokenTokenizer": "tik_token:load_tiktoken",
    "CharLevelTokenizer": "byte_level:load_char_level",
    "ByteTokenizer": "byte_level:load_bytes",
    "CharacterTokenizer": "characters:load_characters",
}
"""Name → ``module:function`` in this package; the function takes :class:`TokenizerKeys`. Loaded when used."""


def load_tokenizer(keys: TokenizerKeys) -> Tokenizer:
    """The tokenizer that ``keys`` (for example ``config.data``) names.

    Raises:
        DataError: the type is unknown, or a file it needs is missing or of another format.
    """
    by_lower_case = {name.lower(): name for name in REGISTRY}
    name = by_lower_case.get(keys.tokenizer_type.lower())
    if name is None:
        near = difflib.get_close_matches(keys.tokenizer_type.lower(), by_lower_case, n=1, cutoff=0)
        raise DataError(
            f"there is no tokenizer_type {keys.tokenizer_type}: the nearest is {by_lower_case[near[0]]}, "
            f"all are {', '.join(REGISTRY)}"
        )
    module_name, function_name = REGISTRY[name].split(":")
    module = import_module(f"{__name__}.{module_name}")
    load: Callable[[TokenizerKeys], Tokenizer] = getattr(module, function_name)
    return load(keys)
