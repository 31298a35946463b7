"""New vocabularies: their sizes, special tokens and reach; and what cannot be trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.data.tokenizers.characters import write_character_vocabulary
from megatron_lite.data.vocabulary import train_byte_level, train_sentencepiece
from megatron_lite.utils.errors import DataError


def test_byte_level_bpe_is_the_librarys_trainer(source_texts: list[str], bpe: tokenizers.Tokenizer) -> None:
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(
        source_texts, vocab_size=600, min_frequency=0, special_tokens=["<|endoftext|>", "<|padding|>"]
    )
    assert bpe.get_vocab() == library.get_vocab()
    assert (bpe.token_to_id("<|endoftext|>"), bpe.token_to_id("<|padding|>")) == (0, 1)
    assert bpe.decode(bpe.encode("日本 🙂\x00").ids) == "日本 🙂\x00"  # all bytes are in it


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_has_bytes_and_specials(spm_files: dict[str, Path], model_type: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm_files[model_type]))
    assert processor.vocab_size() == 600
    assert sum(processor.is_byte(index) for index in range(600)) == 256
    assert processor.is_control(processor.piece_to_id("<|endoftext|>"))
    assert processor.is_control(processor.piece_to_id("<|padding|>"))
    assert processor.unk_id() not in processor.encode("日本 🙂")


def test_too_much_or_too_little_is_asked() -> None:
    with pytest.raises(DataError, match="no room for 256 bytes and 2 special tokens"):
        train_byte_level(["text"], 257)
    with pytest.raises(DataError, match=r"gives only \d+ tokens where 5000 are asked for"):
        train_byte_level(["a little text"], 5000)
    with pytest.raises(
        DataError, match=r"sentencepiece cannot train 5000 pieces on this text: .*[Vv]ocabulary size"
    ):
        train_sentencepiece(["a little text"], 5000, "bpe")


def test_characters_need_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        write_character_vocabulary(["", ""], tmp_path / "v.json")
    assert list(tmp_path.iterdir()) == []


def test_texts_of_every_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": "2"}\n{"q": "3", "a": "4"}\n')
    assert sorted(read_texts([str(tmp_path)], ["q", "a"])) == ["1", "2", "3", "4"]
