"""What token files hold, counted one by one; damage, ids outside the vocabulary, changed bytes are told."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import inspection
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.inspection import (
    Lengths,
    check_ids,
    check_index,
    document_at,
    document_lengths,
    ended_documents,
    read_contents,
)
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(-3, 99), max_size=9), min_size=1, max_size=30),
    chunk=st.sampled_from([1, 2, 1000]),
)
def test_counts(documents: list[list[int]], chunk: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    documents.append([7])
    prefix = tmp_path_factory.mktemp("pair") / "a"
    with IndexedWriter(prefix, np.dtype("<i4")) as writer:
        for document in documents:
            writer.add(document)
    flat = [index for document in documents for index in document]
    owner = [number for number, document in enumerate(documents) for _ in document]
    corpus = IndexedDataset(prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "SEQUENCES_AT_ONCE", chunk)
        patch.setattr(inspection, "TOKENS_AT_ONCE", chunk)
        check_index(corpus)
        contents = read_contents(corpus)
        assert ended_documents(corpus, 7) == sum(document[-1:] == [7] for document in documents)
    assert (contents.smallest, contents.largest) == (min(flat), max(flat))
    assert contents.largest_at == flat.index(max(flat))
    assert document_at(corpus, contents.largest_at) == owner[contents.largest_at]
    assert document_lengths(corpus).tokens.tolist() == list(map(len, documents))
    if min(flat) >= 0:
        check_ids(corpus, contents, max(flat) + 1)
    for vocab_size in {max(flat), 100} if min(flat) < 0 else {max(flat)}:
        with pytest.raises(DataError, match=f"has ids from {min(flat)} to {max(flat)}"):
            check_ids(corpus, contents, vocab_size)


@given(lengths=st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_histogram(lengths: list[int]) -> None:
    counts, edges = Lengths(np.array(lengths, np.int64)).histogram
    assert len(edges) == len(counts) + 1
    for number, count in enumerate(counts.tolist()):
        assert count == sum(edges[number] <= length < edges[number + 1] for length in lengths)
    assert counts.sum() == len(lengths)
    assert all(edges[number + 1] in (1, 2 * edges[number]) for number in range(len(counts)))
    bars = Lengths(np.array(lengths, np.int64)).bars
    assert [bar == " " for bar in bars] == [count == 0 for count in counts]
    assert bars[int(counts.argmax())] == "█"


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (34 + 4, struct.pack("<i", -2), "sequence 1: length -2"),
        (34 + 4, struct.pack("<i", 1), "sequence 2: length 3, offset 10 where 8 is due"),
        (34 + 16 + 16, struct.pack("<q", -10), "sequence 2: length 3, offset -10 where 10 is due"),
        (34 + 16 + 32 + 16, struct.pack("<q", 0), "document 1, which ends before it begins"),
    ],
)
def test_damage_inside_the_index(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    with IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        for document in ([5, 6, 7], [8, 9], [1, 2, 3], [4]):
            writer.add(document)
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[offset : offset + len(value)] = value
    (tmp_path / "a.idx").write_bytes(content)
    corpus = IndexedDataset(tmp_path / "a")  # opening reads no such thing: it costs the same for any corpus
    with pytest.raises(DataError, match=message):
        check_index(corpus)


@pytest.fixture
def encoded(tmp_path: Path, bpe_file: Path, source_texts: list[str]) -> Path:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(source_texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = EncodeSettings(TokenizerSource("HFTokenizer", str(bpe_file)), append_eod=True)
    return preprocess([str(tmp_path / "in")], tmp_path / "out", settings, workers=1).prefixes["text"]


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), *map(str, words)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8")


def test_the_command_line(encoded: Path, source_texts: list[str], tmp_path: Path) -> None:
    result = inspect(f"{encoded}.bin", "--samples", 2, "--plot", tmp_path / "lengths.png")
    assert result.returncode == 0, result.stderr
    corpus = IndexedDataset(encoded)
    for line in (
        f"documents   {len(source_texts)} in {len(source_texts)} sequences",
        f"tokens      {len(corpus.tokens):,} (uint16",
        f"ids         {corpus.tokens.min()} to {corpus.tokens.max()} of 0 to 599",
        f"ended       {len(source_texts)} documents end with the end-of-document token 0",
        "checksums   as in the side file",
        f"document 0, {len(corpus.document(0)):,} tokens: {source_texts[0][:30]!r}"[:-1],
        f"document {len(source_texts) - 1}, ",
    ):
        assert line in result.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    result = inspect(encoded, "--vocab-size", 300)
    assert result.returncode == 2
    assert "where the vocabulary has 0 to 299" in result.stderr
    result = inspect(encoded, "--tokenizer-type", "ByteTokenizer")
    assert (result.returncode, "where the vocabulary has 0 to 256" in result.stderr) == (2, True)
    result = inspect(encoded, "--plot", tmp_path / "lengths.txt")
    assert (result.returncode, "must end in one of .png" in result.stderr) == (2, True)


def test_changed_files_are_told(encoded: Path, bpe_file: Path, tmp_path: Path) -> None:
    tokens = Path(f"{encoded}.bin")
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2] + b"\x01\x00")
    result = inspect(encoded)
    assert result.returncode == 2
    assert (
        "out_text_document.bin is not what out_text_document.json says (its checksum differs)"
        in result.stderr
    )
    tokens.write_bytes(content)
    side_file = Path(f"{encoded}.json")
    facts = side_file.read_text(encoding="utf-8")
    start = facts.index('"fingerprint": "') + 16
    side_file.write_text(facts[:start] + "0" * 32 + facts[start + 32 :], encoding="utf-8")
    result = inspect(encoded)
    assert result.returncode == 2
    assert f"{bpe_file} is no longer the vocabulary" in result.stderr
    side_file.unlink()
    result = inspect(encoded, "--samples", 1)
    assert result.returncode == 0, result.stderr
    assert "unknown: there is no side file" in result.stdout
    assert "(no vocabulary to compare with)" in result.stdout
