"""Streaming never splits a character, whatever the tokenizer does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_lite.generation.stream import TextStream


class Bytes:
    """A token is a byte."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def pieces_of(tokenizer: object, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)  # type: ignore[arg-type]
    return [*(stream.add(token) for token in ids), stream.finish()]


@given(st.text(max_size=40).filter(lambda text: "\ufffd" not in text))
def test_bytes_of_any_text(text: str) -> None:
    pieces = pieces_of(Bytes(), list(text.encode()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_its_character_is_whole() -> None:
    assert pieces_of(Bytes(), list("a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    assert pieces_of(Bytes(), [0x61, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the hat, über 漢字 漢 字 🙂🙃"] * 5, trainer)
    return tokenizer


@settings(max_examples=50)
@given(text=st.text(alphabet="the cat über漢字🙂🙃 ", max_size=30))
def test_byte_level_bpe(byte_level: Tokenizer, text: str) -> None:
    pieces = pieces_of(byte_level, byte_level.encode(text).ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=50)
@given(text=st.text(alphabet="ab ", max_size=30))
def test_a_tokenizer_that_drops_the_leading_space(text: str) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    ids = tokenizer.encode(text).ids
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)
