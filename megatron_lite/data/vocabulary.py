"""New vocabularies from text, byte-level and sentencepiece: what ``tools/train_tokenizer.py`` does."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
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


def train_byte_level(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    specials: Sequence[str] = (END_OF_TEXT, PADDING),
) -> tokenizers.Tokenizer:
    """A byte-level vocabulary (GPT-2's kind) of ``vocab_size`` ids, ``specials`` first. It spells any text.

    Args:
        texts: the text; no token reaches from one into the next.
        vocab_size: number of ids.
        model_type: ``bpe`` or ``unigram``.
        specials: special tokens.

    Raises:
        DataError: ``vocab_size`` has no room for the 256 bytes, or the text too few words for so many ids.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(specials):
        raise DataError(
            f"a vocabulary of {vocab_size} has no room for {len(alphabet)} bytes and {len(specials)} "
            "special tokens: give a larger vocabulary size"
        )
    models = {"bpe": tokenizers.models.BPE, "unigram": tokenizers.models.Unigram}
    trainers = {"bpe": tokenizers.trainers.BpeTrainer, "unigram": tokenizers.trainers.UnigramTrainer}
    library = tokenizers.Tokenizer(models[model_type]())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers[model_type](
        vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text gives only {library.get_vocab_size()} tokens where {vocab_size} are asked for: give "
            "more text or a smaller vocabulary size"
        )
    return library


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str,
    specials: Sequence[str] = (),
    jieba: bool = False,
) -> bytes:
    """A sentencepiece model (the bytes of its file) that can spell any text and keeps its spaces.

    Args:
        texts: the text.
        vocab_size: number of ids, of which 256 are bytes and 5 special.
        model_type: ``bpe`` or ``unigram``.
        specials: more special tokens; unlike the end of a document, they are recognised in text.
        jieba: whether words are cut by jieba, as ``JiebaTokenizer`` cuts them.

    Raises:
        DataError: the library refuses, for example because the text is too short for so many ids.
    """
    lines: Iterator[str] = (line for text in texts for line in text.splitlines(keepends=jieba) if line)
    kept: tuple[str, ...] = ()
    if jieba:
        from megatron_lite.data.tokenizers.jieba_words import LINE_BREAK, SPACE, WordCutter

        lines, kept = map(WordCutter().spaced, lines), (SPACE, LINE_BREAK)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            control_symbols=[END_OF_TEXT, PADDING],
            user_defined_symbols=[*kept, *specials],
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


def write_byte_level(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str,
    path: Path,
    specials: Sequence[str] = (),
    jieba: bool = False,
) -> None:
    """Train and write a tokenizer.json; with ``jieba``, on words as ``JiebaTokenizer`` cuts them."""
    library = train_byte_level(
        words_in(texts) if jieba else texts, vocab_size, model_type, (END_OF_TEXT, PADDING, *specials)
    )
    with atomic_path(path) as temporary:
        library.save(str(temporary))


def words_in(texts: Iterable[str]) -> Iterator[str]:
    """The words of ``texts`` by jieba."""
    from megatron_lite.data.tokenizers.jieba_words import WordCutter

    return chain.from_iterable(map(WordCutter(), texts))


def write_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str,
    path: Path,
    specials: Sequence[str] = (),
    jieba: bool = False,
) -> None:
    """Train and write a .model file; see :func:`train_sentencepiece`."""
    model = train_sentencepiece(texts, vocab_size, model_type, specials, jieba)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model)
