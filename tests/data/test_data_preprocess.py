"""Preprocessing against one-by-one encoding, for every input format; its command line; its errors."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import zstandard

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.data.preprocessing.sources import find_inputs, find_sources
from megatron_lite.data.tokenizers.fast import FastEncoder, fast_encoder
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BYTES = EncodeSettings(TokenizerSource("ByteTokenizer"), append_eod=True)


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def documents_in(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.document_count)]


@pytest.fixture
def corpus(tmp_path: Path, source_texts: list[str]) -> Path:
    """Lines of code as documents under two keys, some empty; small chunks will cut it many times."""
    lines = [line for text in source_texts for line in text.split("\n")][:4000]
    return write_lines(
        tmp_path / "lines.jsonl", [{"text": line, "upper": line.upper() + " Ωж"} for line in lines]
    )


@pytest.mark.parametrize("reference", [False, True])
def test_the_same_as_one_by_one_for_any_workers(
    corpus: Path,
    bpe: tokenizers.Tokenizer,
    bpe_file: Path,
    reference: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_lite.data.preprocessing.sources.TASK_BYTES", 10_000)
    settings = EncodeSettings(
        TokenizerSource("HFTokenizer", str(bpe_file)), ("text", "upper"), append_eod=True, reference=reference
    )
    reports = {
        workers: preprocess([str(corpus)], tmp_path / f"w{workers}", settings, workers) for workers in (1, 3)
    }
    end = bpe.token_to_id("<|endoftext|>")
    for key in ("text", "upper"):
        records = [json.loads(line)[key] for line in corpus.read_text(encoding="utf-8").splitlines()]
        assert "" in records or key == "upper"
        expected = [[*bpe.encode(record).ids, end] for record in records]
        prefix = reports[1].prefixes[key]
        assert prefix == tmp_path / f"w1_{key}_document"
        assert documents_in(prefix) == expected
        assert reports[1].tokens[key] == sum(map(len, expected))
        assert reports[1].documents == len(records)
        for ending in (".bin", ".idx"):
            one, three = (tmp_path / f"w{workers}_{key}_document{ending}" for workers in (1, 3))
            assert one.read_bytes() == three.read_bytes()


def test_every_input_format_in_order(tmp_path: Path) -> None:
    texts = [f"text number {number} é\n" for number in range(10)]
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    write_lines(folder / "a.jsonl", [{"text": texts[0]}, {"text": texts[1]}])
    lines = "".join(
        json.dumps({"text": text}) + "\n\n" for text in texts[2:4]
    ).encode()  # blank lines between
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    lines = "\n".join(json.dumps({"text": text}) for text in texts[4:6]).encode()  # no newline at the end
    frames = zstandard.ZstdCompressor()
    (folder / "below" / "c.jsonl.zst").write_bytes(frames.compress(lines[:20]) + frames.compress(lines[20:]))
    (folder / "d.txt").write_text(texts[6], encoding="utf-8")
    (folder / "e.txt.xz").write_bytes(lzma.compress(texts[7].encode()))
    (folder / ".hidden").write_bytes(b"\xff")
    (tmp_path / "f1.txt").write_text(texts[8], encoding="utf-8")
    (tmp_path / "f2.txt").write_text(texts[9], encoding="utf-8")
    inputs = [
        f"{folder}/a.jsonl,{folder}/b.jsonl.gz",
        str(folder / "below"),
        str(folder / "[de].*"),
        str(tmp_path / "f?.txt"),
    ]
    report = preprocess(inputs, tmp_path / "out", BYTES, workers=1)
    assert documents_in(report.prefixes["text"]) == [[*text.encode(), 256] for text in texts]
    assert [path.name for path in find_inputs([str(folder)])] == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
        "d.txt",
        "e.txt.xz",
    ]


@pytest.mark.parametrize("size", [1, 7, 13, 64, 1000])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
@pytest.mark.parametrize("compressed", [False, True])
def test_lines_and_tasks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, ending: str, compressed: bool
) -> None:
    """Each line is in one task, whole, wherever a task is cut."""
    monkeypatch.setattr("megatron_lite.data.preprocessing.sources.TASK_BYTES", size)
    texts = ["x" * length for length in (50, 0, 3, 100, 0, 0, 5)]
    content = ("\n".join(json.dumps({"text": text}) for text in texts) + ending).encode()
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert list(read_texts([str(path)], ["text"])) == texts
    (source,) = find_sources([str(path)])
    chunks = [task.chunk for task in source.tasks()]
    assert chunks == list(range(len(chunks)))
    assert len(chunks) > 1 or size > len(content) // 2


def test_empty_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": ""}])
    report = preprocess([str(path)], tmp_path / "eod", BYTES, workers=1)
    assert documents_in(report.prefixes["text"]) == [[256], [97, 256], [256]]
    plain = EncodeSettings(TokenizerSource("ByteTokenizer"))
    report = preprocess([str(path)], tmp_path / "plain", plain, workers=1)
    assert documents_in(report.prefixes["text"]) == [[], [97], []]


def test_characters_get_their_vocabulary_from_the_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "cab"}, {"text": "é"}])
    settings = EncodeSettings(TokenizerSource("CharacterTokenizer"), append_eod=True)
    report = preprocess([str(path)], tmp_path / "out", settings, workers=1)
    vocabulary = json.loads((tmp_path / "out_vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == {"a": 0, "b": 1, "c": 2, "é": 3, "<|endoftext|>": 4}
    assert documents_in(report.prefixes["text"]) == [[2, 0, 1, 4], [3, 4]]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: not valid JSON"),
        (b'{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: not a JSON object but list"),
        (
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a\.jsonl, line 2: there is no text under the key 'text' \(keys: body",
        ),
        (b'{"text": 5}\n', r"a\.jsonl, line 1: there is no text under the key 'text'"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not valid JSON"),
        (b"", r"a\.jsonl: the file is empty"),
        (b'{"text": ""}\n', "holds no text under the key 'text'"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, content: bytes, message: str, workers: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"))
    with pytest.raises(DataError, match=message):
        preprocess([str(path)], tmp_path / "out", settings, workers)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-10],
            r"a\.jsonl\.gz is not a whole \.gz file",
        ),
        ("a.jsonl.zst", b"not zstandard", r"a\.jsonl\.zst is not a whole \.zst file"),
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 text \(byte 3\)"),
    ],
    ids=["gz", "zst", "txt"],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        preprocess([str(tmp_path / name)], tmp_path / "out", BYTES, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_zstandard_files_whole_and_cut(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % (number * 7919) for number in range(100_000))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines)[:-50])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is not a whole \.zst file"):
        list(read_texts([str(tmp_path / "a.jsonl.zst")], ["text"]))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(lines)[:-50])
    with pytest.raises(DataError, match=r"b\.txt\.zst is not a whole \.zst file"):
        list(read_texts([str(tmp_path / "b.txt.zst")], ["text"]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines) * 2)
    texts = list(read_texts([str(tmp_path / "a.jsonl.zst")], ["text"]))
    assert texts == [json.loads(line)["text"] for line in lines.splitlines()] * 2


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    preprocess([str(path)], tmp_path / "out", BYTES, workers=1)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = preprocess([str(path)], tmp_path / "out", BYTES, workers=2)
    assert again.was_there
    assert again.documents == 1
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
    other = EncodeSettings(TokenizerSource("ByteTokenizer"))
    with pytest.raises(DataError, match=r"out_text_document\.bin exists and is of another run"):
        preprocess([str(path)], tmp_path / "out", other, workers=1)
    with pytest.raises(DataError, match=r"--input .*none"):
        preprocess([str(tmp_path / "none")], tmp_path / "new", BYTES, workers=1)


def test_a_fast_encoder_that_differs_is_stopped(bpe: tokenizers.Tokenizer) -> None:
    import gigatoken

    other = json.loads(bpe.to_str())
    other["model"]["merges"] = other["model"]["merges"][:10]
    fast = gigatoken.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(other)))
    for joined in (True, False):
        encoder = FastEncoder(bpe, fast, "<|endoftext|>", joined)
        with pytest.raises(DataError, match="different ids for text that begins with 'import sys'"):
            encoder.encode_arrays(["import sys"])


def test_documents_are_the_same_with_the_separator_in_them(bpe: tokenizers.Tokenizer) -> None:
    encoder = fast_encoder(bpe, bpe.to_str(), "<|endoftext|>")
    assert encoder is not None
    assert encoder.joined
    for texts in (
        ["a b", "", " c\n", "\n", "", "é"],
        ["a", "b<|endoftext|>", "<|endoftext|>", "", " c"],
        [""],
    ):
        for ended in (False, True):
            ids, lengths = encoder.encode_arrays(texts, ended)
            end = [bpe.token_to_id("<|endoftext|>")] * ended
            expected = [[*bpe.encode(text).ids, *end] for text in texts]
            assert lengths.tolist() == list(map(len, expected))
            assert ids.tolist() == [index for document in expected for index in document]


def test_the_command_line(tmp_path: Path, bpe_file: Path, bpe: tokenizers.Tokenizer) -> None:
    """A vocabulary is trained, text preprocessed with it, and both commands refuse to overwrite."""
    text = "def main() -> None:\n    print('hello, hello, hello')\n" * 20
    (tmp_path / "a.py").write_text(text)

    def run(tool: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / tool), "--input", str(tmp_path / "a.py"), *words],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )

    vocabulary = tmp_path / "tokenizer.json"
    train = ("train_tokenizer.py", "--vocab-size", "270", "--output", str(vocabulary))
    assert run(*train).returncode == 0
    encode = (
        "preprocess_data.py",
        *("--tokenizer-type", "HFTokenizer", "--vocab-file", str(vocabulary)),
        *(
            "--output-prefix",
            str(tmp_path / "out"),
            "--append-eod",
            "--workers",
            "1",
            "--max-tokens",
            "1000",
        ),
    )
    result = run(*encode)
    assert result.returncode == 0, result.stderr
    assert "1 documents" in result.stdout
    library = tokenizers.Tokenizer.from_file(str(vocabulary))
    assert library.get_vocab_size() == 270
    assert documents_in(tmp_path / "out_text_document") == [[*library.encode(text).ids, 0]]
    for command in (train, encode[:-2]):
        result = run(*command)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert "exists" in result.stderr
