"""Every tokenizer: against its reference library, there and back, its bytes, fingerprint, and export."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.preprocessing.encode import TokenizerSource
from megatron_lite.data.tokenizers import END_OF_TEXT, Tokenizer, load_tokenizer
from megatron_lite.data.tokenizers.byte_alphabet import BYTE_OF_CHARACTER
from megatron_lite.data.tokenizers.characters import write_character_vocabulary
from megatron_lite.utils.errors import DataError

MIXED = "Zoë’s 3,14159 €;  don't\r\n\tΩ≈ 漢字 🙂 end "  # noqa: RUF001


def tiktoken_ranks(bpe: tokenizers.Tokenizer) -> dict[bytes, int]:
    """The ids of ``bpe`` without its two special tokens, as ranks."""
    return {
        bytes(BYTE_OF_CHARACTER[character] for character in token): index - 2
        for token, index in bpe.get_vocab(with_added_tokens=False).items()
        if index >= 2
    }


@pytest.fixture(scope="session")
def sources(
    bpe: tokenizers.Tokenizer,
    bpe_file: Path,
    spm_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, TokenizerSource]:
    """A small tokenizer of each kind, by name."""
    folder = tmp_path_factory.mktemp("vocabularies")
    bpe.model.save(str(folder))
    ranks = folder / "cl100k_base.tiktoken"
    ranks.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tiktoken_ranks(bpe).items())
    )
    write_character_vocabulary([MIXED, "".join(map(chr, range(32, 127)))], folder / "characters.json")
    return {
        "HFTokenizer": TokenizerSource("HFTokenizer", str(bpe_file)),
        "GPT2BPETokenizer": TokenizerSource(
            "GPT2BPETokenizer", str(folder / "vocab.json"), str(folder / "merges.txt")
        ),
        "SPMTokenizer": TokenizerSource("SPMTokenizer", str(spm_files["bpe"])),
        "SPMTokenizer unigram": TokenizerSource("SPMTokenizer", str(spm_files["unigram"])),
        "TiktokenTokenizer": TokenizerSource("TiktokenTokenizer", str(ranks)),
        "CharacterTokenizer": TokenizerSource("CharacterTokenizer", str(folder / "characters.json")),
        "ByteTokenizer": TokenizerSource("ByteTokenizer"),
        "CharLevelTokenizer": TokenizerSource("CharLevelTokenizer"),
    }


KINDS = [
    "HFTokenizer",
    "GPT2BPETokenizer",
    "SPMTokenizer",
    "SPMTokenizer unigram",
    "TiktokenTokenizer",
    "CharacterTokenizer",
    "ByteTokenizer",
    "CharLevelTokenizer",
]


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, sources: dict[str, TokenizerSource]) -> Tokenizer:
    return load_tokenizer(sources[request.param])


def references(sources: dict[str, TokenizerSource]) -> dict[str, Callable[[str], list[int]]]:
    """The ids by each kind's own library, or by definition."""
    ranks = {
        base64.b64decode(line.split()[0]): int(line.split()[1])
        for line in Path(str(sources["TiktokenTokenizer"].vocab_file)).read_bytes().splitlines()
    }
    cl100k = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    library = tokenizers.Tokenizer.from_file(str(sources["HFTokenizer"].vocab_file))
    byte_level = tokenizers.ByteLevelBPETokenizer(
        str(sources["GPT2BPETokenizer"].vocab_file), str(sources["GPT2BPETokenizer"].merge_file)
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sources["SPMTokenizer"].vocab_file))
    unigram = sentencepiece.SentencePieceProcessor(model_file=str(sources["SPMTokenizer unigram"].vocab_file))
    encoding = tiktoken.Encoding("plain", pat_str=cl100k, mergeable_ranks=ranks, special_tokens={})
    characters = json.loads(Path(str(sources["CharacterTokenizer"].vocab_file)).read_text(encoding="utf-8"))
    return {
        "HFTokenizer": lambda text: library.encode(text).ids,
        "GPT2BPETokenizer": lambda text: byte_level.encode(text).ids,
        "SPMTokenizer": processor.EncodeAsIds,
        "SPMTokenizer unigram": unigram.EncodeAsIds,
        "TiktokenTokenizer": encoding.encode,
        "CharacterTokenizer": lambda text: [characters[character] for character in text],
        "ByteTokenizer": lambda text: list(text.encode("utf-8")),
        "CharLevelTokenizer": lambda text: list(text.encode("utf-8")),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys(
    kind: str, sources: dict[str, TokenizerSource], source_texts: list[str]
) -> None:
    reference = references(sources)[kind]
    tokenizer = load_tokenizer(sources[kind])
    texts = [MIXED, "", " ", *([] if kind == "CharacterTokenizer" else source_texts[:3])]
    expected = [reference(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.encode_batch(texts) == expected
    for by_reference in (False, True):
        ids, lengths = tokenizer.encode_arrays(texts, by_reference)
        assert lengths.tolist() == [len(document) for document in expected]
        assert ids.tolist() == [index for document in expected for index in document]


def test_there_and_back(tokenizer: Tokenizer) -> None:
    alphabet = st.sampled_from(MIXED)
    if type(tokenizer).__name__ != "CharacterTokenizer":
        # sentencepiece writes spaces as U+2581 and so reads that character as a space; where the byte 0 ends
        # a document it is no text.
        alphabet = st.characters(codec="utf-8", exclude_characters="▁\0" if tokenizer.eod_id == 0 else "▁")

    @given(text=st.text(alphabet))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_of(np.array(ids, np.int64)) == len(text.encode())

    check()


def test_bytes_of_real_text(tokenizer: Tokenizer, source_texts: list[str]) -> None:
    if type(tokenizer).__name__ == "CharacterTokenizer":
        source_texts = [MIXED]
    ids = [index for text in source_texts for index in [*tokenizer.encode(text), tokenizer.eod_id]]
    batch = np.array(ids[: len(ids) // 2 * 2]).reshape(2, -1)
    padded = np.full_like(batch, tokenizer.vocab_size + 3)
    assert tokenizer.bytes_of(np.stack([batch, padded])) == tokenizer.bytes_of(np.array(batch))
    assert tokenizer.bytes_of(np.array(ids)) == sum(len(text.encode()) for text in source_texts)


def test_fingerprints_tell_tokenizers_apart(
    sources: dict[str, TokenizerSource], bpe: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    prints = {kind: load_tokenizer(source).fingerprint for kind, source in sources.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints == {kind: load_tokenizer(source).fingerprint for kind, source in sources.items()}
    content = json.loads(bpe.to_str())
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    changed = load_tokenizer(TokenizerSource("HFTokenizer", str(tmp_path / "tokenizer.json")))
    assert changed.fingerprint != prints["HFTokenizer"]


def test_auto_tokenizer_gives_the_same_ids(
    tokenizer: Tokenizer, source_texts: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    texts = [MIXED] if type(tokenizer).__name__ == "CharacterTokenizer" else [MIXED, *source_texts[:3]]
    for text in texts:
        ids = tokenizer.encode(text)
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == text
    if tokenizer.eod_id != 0 or tokenizer.vocab_size != 512:  # the byte 0 has no spelling as a special token
        assert auto.eos_token_id == tokenizer.eod_id


def test_special_tokens_in_text(sources: dict[str, TokenizerSource]) -> None:
    for kind in ("HFTokenizer", "GPT2BPETokenizer", "TiktokenTokenizer"):
        tokenizer = load_tokenizer(sources[kind])
        ids = tokenizer.encode(f"a{END_OF_TEXT}b")
        assert ids[1:-1] == [tokenizer.eod_id]
        assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
        assert tokenizer.encode_arrays([f"a{END_OF_TEXT}b"])[0].tolist() == ids


def test_characters_cut_in_two_are_replaced(sources: dict[str, TokenizerSource]) -> None:
    for kind in ("ByteTokenizer", "TiktokenTokenizer", "HFTokenizer"):
        tokenizer = load_tokenizer(sources[kind])
        assert "�" in tokenizer.decode(tokenizer.encode("€")[:-1])


def test_a_character_outside_the_vocabulary(sources: dict[str, TokenizerSource]) -> None:
    with pytest.raises(DataError, match=r"'я' \(U\+044F\) is not in the vocabulary .*characters\.json"):
        load_tokenizer(sources["CharacterTokenizer"]).encode("aя")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TokenizerSource("HFTokeniser"), "no tokenizer_type HFTokeniser: the nearest is HFTokenizer"),
        (TokenizerSource("HFTokenizer"), "needs a vocabulary: give the file in the key vocab_file"),
        (TokenizerSource("HFTokenizer", "/none/tokenizer.json"), "no file /none/tokenizer.json"),
        (TokenizerSource("GPT2BPETokenizer", __file__), "key merge_file"),
        (TokenizerSource("GPT2BPETokenizer", __file__, __file__), "not a BPE vocabulary"),
        (TokenizerSource("HFTokenizer", __file__), "is not a tokenizer.json"),
        (TokenizerSource("SPMTokenizer", __file__), "is not a sentencepiece model"),
        (TokenizerSource("TiktokenTokenizer", __file__), "does not say which encoding it is"),
        (TokenizerSource("TiktokenTokenizer", "gpt5"), "no tiktoken encoding of that name"),
        (TokenizerSource("CharacterTokenizer", __file__), "not a vocabulary of characters"),
    ],
)
def test_wrong_vocabularies_are_named(source: TokenizerSource, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(source)


def test_tokenizer_config_names_the_end(bpe_file: Path, bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|padding|>"}}')
    tokenizer = load_tokenizer(TokenizerSource("HFTokenizer", str(tmp_path)))
    assert tokenizer.eod_id == bpe.token_to_id("<|padding|>")


def test_documents_are_whole_whatever_the_file_cuts_and_pads(
    bpe: tokenizers.Tokenizer, bpe_file: Path, tmp_path: Path
) -> None:
    """A tokenizer saved by whoever had batches of one length."""
    other = tokenizers.Tokenizer.from_str(bpe.to_str())
    other.enable_truncation(max_length=3)
    other.enable_padding()
    other.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(TokenizerSource("HFTokenizer", str(tmp_path)))
    texts = ["ab", "a much longer text, of many tokens"]
    expected = [bpe.encode(text).ids for text in texts]
    assert len(expected[1]) > 3
    assert [tokenizer.encode(text) for text in texts] == tokenizer.encode_batch(texts) == expected
    for reference in (False, True):
        ids, lengths = tokenizer.encode_arrays(texts, reference)
        assert (ids.tolist(), lengths.tolist()) == ([*expected[0], *expected[1]], list(map(len, expected)))
    assert tokenizer.fingerprint == load_tokenizer(TokenizerSource("HFTokenizer", str(bpe_file))).fingerprint


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_tokenizer_config_is_named(bpe_file: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json .* JSON"):
        load_tokenizer(TokenizerSource("HFTokenizer", str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "vocab_size", "eod_id"),
    [
        (TokenizerSource("GPT2BPETokenizer", "gpt2/vocab.json", "gpt2/merges.txt"), 50257, 50256),
        (TokenizerSource("HFTokenizer", "gpt-neox-20b/tokenizer.json"), 50277, 0),
        (TokenizerSource("SPMTokenizer", "llama-spm/mistral-v1.model"), 32000, 2),
    ],
    ids=lambda value: getattr(value, "tokenizer_type", None),
)
def test_well_known_vocabularies_on_real_text(
    source: TokenizerSource, vocab_size: int, eod_id: int, real_data: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = real_data / "tokenizers"
    tokenizer = load_tokenizer(
        TokenizerSource(
            source.tokenizer_type,
            str(folder / str(source.vocab_file)),
            str(folder / source.merge_file) if source.merge_file else None,
        )
    )
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (vocab_size, eod_id)
    texts = []
    for name in ("chinese-poetry", "english-short-documents"):
        lines = (real_data / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:40]
        texts += [json.loads(line)["text"] for line in lines]
    ids = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(document) for document in ids] == texts
    # A sentencepiece model puts a space before each text.
    extra = len(texts) if source.tokenizer_type == "SPMTokenizer" else 0
    in_ids = sum(tokenizer.bytes_of(np.array(document)) for document in ids)
    assert in_ids == sum(len(text.encode()) for text in texts) + extra
    flat, lengths = tokenizer.encode_arrays(texts)
    assert flat.tolist() == [index for document in ids for index in document]
    assert lengths.tolist() == list(map(len, ids))
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == ids
