"""New vocabularies from text, byte-level BPE and sentencepiece: what ``tools/train_tokenizer.py`` does."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_lite.data.tokenizers import END_OF_TEXT, PADDING
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

LONGEST_LINE = 1 << 16
"""Bytes; sentencepiece leaves longer lines out of the training text."""

MOST_LINES = 5_000_000
"""Lines that sentencepiece trains on, drawn evenly from all: it holds them in memory."""


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str] = (END_OF_TEXT, PADDING)
) -> tokenizers.Tokenizer:
    """A byte-level BPE (GPT-2's kind) of ``vocab_size`` ids, ``specials`` first. It can spell any text.

    Raises:
        DataError: ``vocab_size`` has no room for the 256 bytes, or the text too few words for so many ids.
    """
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(specials):
        raise DataError(
            f"a vocabulary of {vocab_size} has no room for {len(alphabet)} bytes and {len(specials)} "
            "special tokens: give a larger vocabulary size"
        )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text gives only {library.get_vocab_size()} tokens where {vocab_size} are asked for: give "
            "more text or a smaller vocabulary size"
        )
    return library


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    """A sentencepiece model (the bytes of its file) that can spell any text and keeps its spaces.

    Args:
        texts: the text.
        vocab_size: number of ids, of which 256 are bytes and 5 special.
        model_type: ``bpe`` or ``unigram``.

    Raises:
        DataError: the library refuses, for example because the text is too short for so many ids.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            control_symbols=[END_OF_TEXT, PADDING],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=LONGEST_LINE,
            input_sentence_size=MOST_LINES,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip().rstrip(".")
        raise DataError(f"sentencepiece cannot train {vocab_size} pieces on this text: {reason}") from None
    return model.getvalue()


def write_byte_level_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train and write a tokenizer.json."""
    library = train_byte_level_bpe(texts, vocab_size)
    with atomic_path(path) as temporary:
        library.save(str(temporary))


def write_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str, path: Path) -> None:
    """Train and write a .model file."""
    model = train_sentencepiece(texts, vocab_size, model_type)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model)
