"""Every kind of input gives the documents that its own library wrote; every option does what it says."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
import types
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing import sources
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource, split_lengths, surround
from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.data.preprocessing.transforms import Predicate, TextSettings
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first é", "二", "", "third \U0001f600 line\nof two", "x" * 3000, *(f"text {n}" for n in range(200))]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))


def write_bz2(path: Path) -> None:
    write_jsonl(path)
    path.write_bytes(bz2.compress(path.read_bytes()))


def write_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))


def write_parquet(path: Path) -> None:
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=37)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=37)


def write_arrow_stream(path: Path) -> None:
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=37)


def write_tar(path: Path, mode: str = "w") -> None:
    """A text file, lines, compressed lines, text files."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        add("a.txt", TEXTS[0].encode())
        add("b.jsonl", "".join(lines[1:100]).encode())
        add("folder/._hidden", b"\xff")
        add("folder/c.jsonl.gz", gzip.compress("".join(lines[100:150]).encode()))
        for index in range(150, len(TEXTS)):
            add(f"folder/d{index}.txt", TEXTS[index].encode())


def write_dat(path: Path) -> None:
    lm_dataformat = pytest.importorskip("lm_dataformat")
    archive = lm_dataformat.DatArchive(str(path.parent / "dat"))
    for text in TEXTS:
        archive.add_data(text)
    archive.commit("x")
    next((path.parent / "dat").iterdir()).rename(path)


def write_archive(path: Path) -> None:
    lm_dataformat = pytest.importorskip("lm_dataformat")
    archive = lm_dataformat.Archive(str(path.parent / "archive"))
    for text in TEXTS:
        archive.add_data(text.split("\n\n"), meta={"some": "thing"})
    archive.commit()
    next((path.parent / "archive").glob("*.jsonl.zst")).rename(path)


def write_json_archive(path: Path) -> None:
    lm_dataformat = pytest.importorskip("lm_dataformat")
    archive = lm_dataformat.JSONArchive(str(path.parent / "json"))
    for text in TEXTS:
        archive.add_data(text)
    archive.commit()
    next((path.parent / "json").iterdir()).rename(path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.bz2": write_bz2,
    "a.json": write_array,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_file,
    "b.arrow": write_arrow_stream,
    "a.tar": write_tar,
    "a.tar.gz": lambda path: write_tar(path, "w:gz"),
    "a.tgz": lambda path: write_tar(path, "w:gz"),
    "a.tar.xz": lambda path: write_tar(path, "w:xz"),
    "a.dat.zst": write_dat,
    "b.jsonl.zst": write_archive,
    "b.json.zst": write_json_archive,
}


@pytest.mark.parametrize("size", [100, 1000, 1 << 20])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", size)
    FORMATS[name](tmp_path / name)
    assert list(read_texts([str(tmp_path / name)], ["text"])) == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_told(tmp_path: Path, name: str) -> None:
    """Half a file, and one with changed bytes in the middle: an error that names it, or (text) all of it."""
    FORMATS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        list(read_texts([str(tmp_path / name)], ["text"]))


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as the datasets library saves it; a name, which that library streams where it is installed."""
    (tmp_path / "saved").mkdir()
    write_arrow_stream(tmp_path / "saved" / "data-00000-of-00001.arrow")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "saved" / name).write_text('{"_fingerprint": "x"}')
    assert list(read_texts([str(tmp_path / "saved")], ["text"])) == TEXTS

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert (name, split, streaming) == ("some/name", "validation", True)
        return [{"text": text, "id": number} for number, text in enumerate(TEXTS)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_texts(["hf:some/name:validation"], ["text"])) == TEXTS
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs the datasets library: pip install datasets"):
        list(read_texts(["hf:some/name"], ["text"]))


def damaged(content: bytes, generator: random.Random) -> bytes:
    """``content`` cut off, with a bit flipped, or with other bytes in a place."""
    kind = generator.randrange(3)
    place = generator.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]
    noise = generator.randbytes(generator.randrange(64))
    return content[:place] + noise + content[place + generator.randrange(1, 64) :]


@pytest.mark.parametrize("name", FORMATS)
def test_forty_damages_lose_nothing_in_silence(tmp_path: Path, name: str) -> None:
    """An error that names the file, or as many documents as were written (a flipped bit may just be text)."""
    FORMATS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    generator = random.Random(name)
    messages: list[str] = []
    for _ in range(40):
        now = damaged(content, generator)
        (tmp_path / name).write_bytes(now)
        try:
            count = len(list(read_texts([str(tmp_path / name)], ["text"])))
        except DataError as error:
            messages.append(str(error))
        else:
            assert count == len(TEXTS) or content.startswith(now.rstrip(b"\n"))
    assert len(messages) >= 20
    assert all(name in message for message in messages)


def test_separated_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 5)
    text = "one\n---\n\n---\ntwo\n---\n---\nthree"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four"))
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"), separator="\n---\n")
    report = preprocess([str(tmp_path / "*.txt*")], tmp_path / "out", settings, workers=2)
    assert documents_of(report.prefixes["text"]) == [*filter(None, text.split("\n---\n")), "four"]


def documents_of(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [bytes(dataset.document(n).astype("u1")).decode() for n in range(dataset.document_count)]


def test_standard_input(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "-"]
    command += ["--tokenizer-type", "ByteTokenizer", "--output-prefix", str(tmp_path / "out")]
    result = subprocess.run(command, input=(tmp_path / "a.jsonl").read_bytes(), capture_output=True)
    assert result.returncode == 0, result.stderr
    assert documents_of(tmp_path / "out_text_document") == TEXTS
    assert f"{len(TEXTS)} documents" in result.stdout.decode()


def run_options(tmp_path: Path, records: list[Any], **options: Any) -> list[str]:
    """The documents, as text, of ``records`` preprocessed with ``options``."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"), **options)
    return documents_of(preprocess([str(path)], tmp_path / "out", settings, workers=1).prefixes["text"])


def test_text_options(tmp_path: Path) -> None:
    texts = ["sÃ¼ÃŸ", "e\u0301t\u00e9", "ab"]
    settings = TextSettings(ftfy=True, normal_form="NFC", min_length=3)
    expected = [unicodedata.normalize("NFC", ftfy.fix_text(text)) for text in texts[:2]]
    assert expected[0] == "süß"
    assert run_options(tmp_path, [{"text": text} for text in texts], text=settings) == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("meta.lang=en", "ad"),
        ("meta.lang!=en", "b"),
        ("score>=0.5", "ac"),
        ("score<0.5", "bd"),
        ("ok", "a"),
        ("ok=false", "b"),
        ("none", ""),
    ],
)
def test_filters(condition: str, expected: str) -> None:
    records = [
        {"text": "a", "meta": {"lang": "en"}, "score": 0.9, "ok": True},
        {"text": "b", "meta": {"lang": "de"}, "score": 0.1, "ok": False},
        {"text": "c", "meta": None, "score": 1},
        {"text": "d", "meta": {"lang": "en"}, "score": 0},
    ]
    keep = Predicate(condition)
    assert "".join(record["text"] for record in records if keep(record)) == expected


def test_filter_and_nested_keys_by_format(tmp_path: Path) -> None:
    records = [{"text": f"{n}", "meta": {"n": n, "name": f"name {n}"}} for n in range(10)]
    assert run_options(tmp_path, records, text=TextSettings(filter="meta.n>=7")) == ["7", "8", "9"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    settings = EncodeSettings(
        TokenizerSource("ByteTokenizer"), ("meta.name",), text=TextSettings(filter="meta.n>=7")
    )
    report = preprocess([str(tmp_path / "a.parquet")], tmp_path / "p", settings, workers=1)
    assert documents_of(report.prefixes["meta.name"]) == ["name 7", "name 8", "name 9"]
    assert report.totals.dropped == 7


def test_special_tokens_and_cut_documents(
    tmp_path: Path, bpe: tokenizers.Tokenizer, bpe_file: Path, source_texts: list[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*source_texts, ""]))
    end = bpe.token_to_id("<|endoftext|>")
    settings = EncodeSettings(
        TokenizerSource("HFTokenizer", str(bpe_file)),
        append_eod=True,
        prepend=("7", "<|padding|>"),
        append=("8",),
        max_tokens=100,
    )
    report = preprocess([str(tmp_path / "a.jsonl")], tmp_path / "out", settings, workers=2)
    padding = bpe.token_to_id("<|padding|>")
    whole = [[7, padding, *bpe.encode(text).ids, 8, end] for text in [*source_texts, ""]]
    expected = [ids[start : start + 100] for ids in whole for start in range(0, len(ids), 100)]
    dataset = IndexedDataset(report.prefixes["text"])
    assert [dataset.document(n).tolist() for n in range(dataset.document_count)] == expected
    wrong = EncodeSettings(TokenizerSource("HFTokenizer", str(bpe_file)), prepend=("<|none|>",))
    with pytest.raises(DataError, match=r"'<\|none\|>' is not one token"):
        preprocess([str(tmp_path / "a.jsonl")], tmp_path / "wrong", wrong, workers=1)


@given(st.lists(st.integers(0, 50)), st.integers(1, 20))
def test_split_lengths(lengths: list[int], most: int) -> None:
    import numpy as np

    expected = [min(most, n - s) for n in lengths for s in range(0, max(n, 1), most)]
    assert split_lengths(np.array(lengths, np.int64), most).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 9))), st.lists(st.integers(10, 19), max_size=3), st.integers(0, 3))
def test_surround(documents: list[list[int]], before: list[int], count: int) -> None:
    import numpy as np

    after = list(range(20, 20 + count))
    tokens = np.array([id for document in documents for id in document], np.uint16)
    result, lengths = surround(tokens, np.array([len(d) for d in documents], np.int64), before, after)
    expected = [[*before, *document, *after] for document in documents]
    assert result.tolist() == [id for document in expected for id in document]
    assert lengths.tolist() == [len(document) for document in expected]


BAD_LINES = [
    b'{"text": NaN}',
    b'{"text": "a\\ud800"}',
    b'{"text": "\xff"}',
    b'{"text": "a"',
    b'{"body": "a"}',
    b'{"text": ["a", 1]}',
    b"17",
    b"\x00\x01",
    b'{"text": null}',
]


@pytest.mark.parametrize("size", [40, 1 << 20])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_bad_lines_are_skipped_and_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: int,
    ending: str,
) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", size)
    good = [f'{{"text": "good {number}"}}'.encode() for number in range(len(BAD_LINES))]
    content = b"\n".join(line for pair in zip(good, BAD_LINES, strict=True) for line in pair) + b"\n"
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"))
    report = preprocess([str(path)], tmp_path / "out", settings, workers=2, on_error="skip")
    assert documents_of(report.prefixes["text"]) == [f"good {number}" for number in range(len(good))]
    assert report.totals.bad == len(BAD_LINES)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(told) == len(BAD_LINES)
    for number, line in enumerate(told):
        assert line.startswith(f"skipped: {path}, line {2 * number + 2}: ")


def test_broken_utf8_is_replaced_if_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9 \xf0\x9f"}\n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"), text=TextSettings(replace_invalid=True))
    report = preprocess([str(tmp_path / "?.*")], tmp_path / "out", settings, workers=1)
    assert documents_of(report.prefixes["text"]) == ["caf\ufffd \ufffd", "caf\ufffd"]


def test_the_side_file(tmp_path: Path, bpe_file: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    settings = EncodeSettings(TokenizerSource("HFTokenizer", str(bpe_file)), append_eod=True)
    prefix = preprocess([str(tmp_path / "a.parquet")], tmp_path / "out", settings, workers=1).prefixes["text"]
    facts = json.loads(prefix.with_name(prefix.name + ".json").read_text())
    dataset = IndexedDataset(prefix)
    assert facts["tokens"] == len(dataset.tokens)
    assert facts["documents"] == facts["records"] == len(TEXTS)
    assert (facts["smallest"], facts["largest"]) == (dataset.tokens.min(), dataset.tokens.max())
    assert facts["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert facts["sources"] == [
        {"file": str(tmp_path / "a.parquet"), "bytes": (tmp_path / "a.parquet").stat().st_size}
    ]
    for ending in ("bin", "idx"):
        content = prefix.with_name(f"{prefix.name}.{ending}").read_bytes()
        assert facts["xxh3_128"][ending] == xxhash.xxh3_128(content).hexdigest()


def test_zstandard_frames_and_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that the disk cannot hold stops at its beginning."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(content[:500]) + zstandard.compress(content[500:])
    )
    assert list(read_texts([str(tmp_path / "a.jsonl.zst")], ["text"])) == TEXTS
    monkeypatch.setattr(sources, "TASK_BYTES", 400)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    write_jsonl(tmp_path / "b.jsonl")
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"))
    with pytest.raises(DataError, match="make room or give another --output-prefix"):
        preprocess([str(tmp_path / "b.jsonl")], tmp_path / "out", settings, workers=1)
