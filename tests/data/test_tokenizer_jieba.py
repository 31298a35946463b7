"""Chinese words cut by jieba: against CPM's own few lines, there and back, from training to token files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jieba
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.training_runs import losses, run

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.data.vocabulary import write_byte_level, write_sentencepiece
from megatron_lite.generation import Sampling, generate, load_model
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]

CHINESE = [
    "我来到北京清华大学，他来到了网易杭研大厦。\n小明硕士毕业于中国科学院计算所，后在日本京都大学深造。",  # noqa: RUF001
    "自古多名勝 解剪尊前聽不窮。\r\n\n  缩进的一行\t和制表符　全角空格",
    "GPT-3 is a language model; 它有1750亿个参数。\U0001f642 <|user|>你好<|endoftext|>",
]
KINDS = ["bpe.json", "unigram.json", "bpe.model", "unigram.model"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> dict[str, Path]:
    """A vocabulary of each kind, with a special token of its own."""
    folder = tmp_path_factory.mktemp("jieba")
    for name in KINDS:
        model_type, ending = name.split(".")
        write = write_byte_level if ending == "json" else write_sentencepiece
        write([*CHINESE * 3, source_texts[0]], 450, model_type, folder / name, ["<|user|>"], jieba=True)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(TokenizerSource("JiebaTokenizer", str(files[request.param])))


def test_there_and_back(tokenizer: Tokenizer) -> None:
    # CPM's signs for a space, a line break and the end of a word are no text.
    characters = st.characters(codec="utf-8", exclude_characters="▁▂▃")

    @given(text=st.one_of(st.text(characters), st.text(st.sampled_from("".join(CHINESE)))))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        if "<|" not in text:
            assert tokenizer.bytes_of(np.array(ids, np.int64)) == len(text.encode())

    check()
    for text in CHINESE:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["bpe.model", "unigram.model"])
def test_the_ids_of_cpms_own_lines(name: str, files: dict[str, Path]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(files[name]))
    translator = str.maketrans(" \n", "▂▃")
    tokenizer = load_tokenizer(TokenizerSource("jiebatokenizer", str(files[name])))
    for text in CHINESE[:2]:
        segments = [word.translate(translator) for word in jieba.cut(text, cut_all=False)]
        ids = processor.encode(" ".join(segments))
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode_batch([text]) == [ids]
        restored = processor.decode(ids).replace(" ", "").replace("▂", " ").replace("▃", "\n")
        assert tokenizer.decode(ids) == restored == text


@pytest.mark.parametrize("name", ["bpe.json", "unigram.json"])
def test_each_word_has_the_ids_it_has_alone(name: str, files: dict[str, Path]) -> None:
    library = tokenizers.Tokenizer.from_file(str(files[name]))
    tokenizer = load_tokenizer(TokenizerSource("JiebaTokenizer", str(files[name])))
    for text in CHINESE[:2]:
        ids = [index for word in jieba.cut(text) for index in library.encode(word).ids]
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode_batch([text]) == [ids]


@pytest.mark.parametrize("jieba_first", [True, False])
def test_no_token_reaches_over_two_words(jieba_first: bool, tmp_path: Path) -> None:
    write_byte_level(CHINESE * 3, 440, "bpe", tmp_path / "a.json", jieba=jieba_first)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "a.json"))
    words = {word for text in CHINESE for word in jieba.cut(text)}
    tokens = {library.decode([index]) for index in range(2, library.get_vocab_size())}
    chinese = {token for token in tokens if len(token) > 1 and all("一" <= sign <= "鿿" for sign in token)}
    assert len(chinese) >= 5
    assert all(any(token in word for word in words) for token in chinese) == jieba_first


def test_special_tokens_in_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你好<|user|>大厦")
    alone = tokenizer.encode("<|user|>")[-1:]
    assert alone[0] in ids
    assert tokenizer.decode(alone) == "<|user|>"


def test_fingerprint_and_export(tokenizer: Tokenizer, files: dict[str, Path], tmp_path: Path) -> None:
    prints = set()
    for name, path in files.items():
        plain = "SPMTokenizer" if name.endswith(".model") else "HFTokenizer"
        prints |= {
            load_tokenizer(TokenizerSource(kind, str(path))).fingerprint for kind in ("JiebaTokenizer", plain)
        }
    assert len(prints) == 2 * len(files)
    with pytest.raises(DataError, match=r"cannot be written as a tokenizer\.json"):
        tokenizer.save_pretrained(tmp_path)


def test_from_texts_to_a_model_and_its_own_text(tmp_path: Path) -> None:
    """A vocabulary and the token files by the command line, some steps of training, text out of the model."""
    texts = CHINESE * 20
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )

    def train(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(ROOT / "tools/train_tokenizer.py"),
            "--input",
            str(tmp_path / "a.jsonl"),
        ]
        command += ["--vocab-size", "369", "--jieba", "--output", str(output), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}
        )

    result = train(tmp_path / "jieba.model", "--tokenizer-type", "SPMTokenizer", "--model-type", "unigram")
    assert result.returncode == 0, result.stderr
    assert "use it with tokenizer_type JiebaTokenizer" in result.stdout
    settings = EncodeSettings(
        TokenizerSource("JiebaTokenizer", str(tmp_path / "jieba.model")), append_eod=True
    )
    report = preprocess([str(tmp_path / "a.jsonl")], tmp_path / "out", settings, workers=2)
    dataset = IndexedDataset(report.prefixes["text"])
    tokenizer = load_tokenizer(settings.tokenizer)
    assert dataset.document_count == len(texts)
    for number, text in enumerate(texts):
        ids = dataset.document(number).tolist()
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.decode(ids[:-1]) == text

    keys = {"tokenizer_type": "JiebaTokenizer", "vocab_file": str(tmp_path / "jieba.model"), "split": "1"}
    measured = run(
        tmp_path / "run", report.prefixes["text"], **keys, vocab_size=tokenizer.vocab_size, train_iters=8
    )
    first, *_, last = losses(measured)
    assert last < first - 0.3
    model = load_model(tmp_path / "run/checkpoints", torch.device("cpu"))
    prompt = "我来到北京"
    (sample,) = generate(model, [prompt], Sampling(0.0), 12)
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        for _ in range(sample.tokens):
            ids.append(int(model.gpt(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()))
    assert prompt + sample.text == tokenizer.decode(ids[:-1] if sample.finished else ids)

    (tmp_path / "folder.model").mkdir()
    (tmp_path / "folder.model" / "kept").touch()
    for output, message in (
        ("folder.model", "exists and is left as it is"),
        ("jieba.model", "exists and is left as it is"),
        ("other.json", "the file of a SPMTokenizer ends in .model"),
    ):
        result = train(tmp_path / output, "--tokenizer-type", "SPMTokenizer")
        assert result.returncode == 2
        assert message in result.stderr
    assert (tmp_path / "folder.model" / "kept").exists()
