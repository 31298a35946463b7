"""Some 600 damaged inputs: each is a clear error or gives what an independent reader finds; none is skipped
in silence, and none stops the interpreter.

Damage is drawn with a fixed seed: cut off, a bit flipped, bytes zeroed, garbage put in or added, empty; and
by hand what JSON and indexes can have wrong.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xxhash
import zstandard

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.inspection import (
    check_contents,
    check_ids,
    check_index,
    read_contents,
    recorded_tokenizer,
)
from megatron_lite.data.merging import merge
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.facts import write_facts
from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.utils.errors import DataError

TEXTS = [f"Text {number}: naïve 漢字 \U0001f642 " + "abc " * (number % 7) for number in range(40)]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


class Refused(Exception):
    """What an independent reader thinks of a file that is not whole."""


def damaged(content: bytes, generator: random.Random) -> bytes:
    """``content`` with one thing wrong."""
    place = generator.randrange(len(content))
    rest = content[place:]
    kind = generator.randrange(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([rest[0] ^ 1 << generator.randrange(8)]) + rest[1:]
    if kind == 2:
        return content[:place] + bytes(min(len(rest), generator.choice([1, 16, 512]))) + rest[512:]
    if kind == 3:
        return content[:place] + generator.randbytes(generator.choice([1, 4, 100])) + rest
    if kind == 4:
        return content + generator.randbytes(generator.choice([1, 16, 600]))
    return content[:place] + rest[generator.choice([1, 2, 30]) :]


# What independent readers find.


def from_lines(content: bytes) -> list[str]:
    """By Python's json, strictly."""
    if content.lstrip()[:1] == b"[":
        raise Refused("an array is another format")
    texts = []
    for line in content.split(b"\n"):
        if line.strip():
            texts.append(text_of(loaded(line)))
    if not content:
        raise Refused("empty")
    return texts


def loaded(content: bytes) -> Any:
    def refuse(name: str) -> None:
        raise Refused(name)

    try:
        return json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(str(error)) from None


def text_of(record: Any) -> str:
    text = record if isinstance(record, str) else record.get("text") if isinstance(record, dict) else None
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused("half a character") from None
    if not isinstance(text, str):
        raise Refused("no text")
    return text


def from_array(content: bytes) -> list[str]:
    records = loaded(content)
    if not isinstance(records, list):
        raise Refused("no array")
    return list(map(text_of, records))


def from_text(content: bytes) -> list[str]:
    try:
        if content:
            return [content.decode()]
    except UnicodeDecodeError:
        pass
    raise Refused("no text")


def by(decompress: Callable[[bytes], bytes]) -> Callable[[bytes], list[str]]:
    """Of compressed lines."""

    def read(content: bytes) -> list[str]:
        try:
            lines = decompress(content)
        except Exception as error:  # of many kinds; all mean damage
            raise Refused(str(error)) from None
        return from_lines(lines)

    return read


def unzstd(content: bytes) -> bytes:
    result = b""
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        result += frame.decompress(content)
        if not frame.eof:
            raise Refused("breaks off")
        content = frame.unused_data
    return result


def as_many_or_refused(content: bytes) -> None:
    """Formats without checksums of their content: other letters cannot be found out, fewer texts can."""


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file, row_group_size=10)
    return file.getvalue()


def arrow() -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, text in enumerate(TEXTS):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()


def dat() -> bytes:
    return b"".join(b"%016d%s" % (len(text.encode()), text.encode()) for text in TEXTS)


FORMATS: dict[str, tuple[bytes, Callable[[bytes], list[str] | None], int]] = {
    "a.jsonl": (LINES, from_lines, 80),
    "a.json": (json.dumps([{"text": text} for text in TEXTS]).encode(), from_array, 40),
    "a.txt": (TEXTS[5].encode(), from_text, 30),
    "a.jsonl.gz": (gzip.compress(LINES, mtime=0), by(gzip.decompress), 30),
    "a.jsonl.xz": (lzma.compress(LINES), by(lzma.decompress), 30),
    "a.jsonl.bz2": (bz2.compress(LINES), by(bz2.decompress), 30),
    "a.jsonl.zst": (zstandard.compress(LINES), by(unzstd), 30),
    "a.parquet": (parquet(), as_many_or_refused, 30),
    "a.arrow": (arrow(), as_many_or_refused, 30),
    "a.tar": (tar(), as_many_or_refused, 30),
    "a.dat": (dat(), as_many_or_refused, 20),
}
"""Name → a whole file, an independent reader, and how often it is damaged: 380 in all."""


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_text_files(name: str, tmp_path: Path) -> None:
    content, read, count = FORMATS[name]
    generator = random.Random(name)
    path = tmp_path / name
    path.write_bytes(content)
    whole = list(read_texts([str(path)], ["text"]))
    assert len(whole) == (1 if name == "a.txt" else len(TEXTS))
    refused = 0
    for number in range(count):
        broken = b"" if number == 0 else damaged(content, generator)
        path.write_bytes(broken)
        try:
            found = list(read_texts([str(path)], ["text"]))
        except DataError as error:
            refused += 1
            told, found = str(error), None
            assert name in told
        if read is as_many_or_refused:
            assert found is None or len(found) == len(whole), (number, broken)
        else:
            try:
                expected = read(broken)
            except Refused:
                expected = None
            assert found == expected, (number, broken)
    assert refused > count // 4


BAD_LINES = [
    *[b'{"text": "a", "n": %s}' % word for word in (b"NaN", b"Infinity", b"-Infinity", b"nan", b"1e", b"01")],
    *[b'{"text": "a%s"}' % half for half in (rb"\ud800", rb"\udc00x", rb"\ud83d\u0041", b"\xed\xa0\x80")],
    *[b'{"text": %s}' % value for value in (b"null", b"1", b"true", b"{}", b"[1]", b"")],
    *[b'{"text": "a%s"}' % byte for byte in (b"\x00", b"\x1f", b"\xff", b"\xc3", b"\\x41", b"\\")],
    b"{}",
    b'{"Text": "a"}',
    b'{"text": "a"} {"text": "b"}',
    b'{"text": "a",}',
    b"{'text': 'a'}",
    b"\xef\xbb\xbf" + b'{"text": "a"}',
    b"\xff\xfe{\x00}\x00",
    b"[" * 100_000,
    b'{"text": ' * 5_000 + b"1" + b"}" * 5_000,
    b"\x00",
    b"NaN",
    b"12",
]
"""Lines that are no record, 34 of them."""


def test_bad_lines_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = b'{"text": "good"}\n'
    path = tmp_path / "a.jsonl"
    for line in BAD_LINES:
        path.write_bytes(good * 2 + line + b"\n" + good)
        with pytest.raises(DataError, match=r"a\.jsonl, line 3: "):
            list(read_texts([str(path)], ["text"]))
    path.write_bytes(good + good.join(line + b"\n" for line in BAD_LINES) + good)
    settings = EncodeSettings(TokenizerSource("ByteTokenizer"))
    report = preprocess([str(path)], tmp_path / "out", settings, workers=1, on_error="skip")
    assert report.totals.bad == len(BAD_LINES)
    assert report.documents == len(BAD_LINES) + 1
    told = capsys.readouterr().err
    assert all(f"a.jsonl, line {2 * number + 2}: " in told for number in range(20))
    assert f"{len(BAD_LINES) - 20:,} more after it" in told
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: "):
        preprocess([str(path)], tmp_path / "stopped", settings, workers=2)
    assert not list(tmp_path.glob("stopped*"))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A pair with its side file."""
    generator = random.Random(3)
    with IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        for _ in range(50):
            writer.add([generator.randrange(1000) for _ in range(generator.randrange(20))])
    write_side_file(tmp_path / "a")
    return tmp_path / "a"


def write_side_file(prefix: Path) -> None:
    sums = {
        ending: xxhash.xxh3_128_hexdigest(Path(f"{prefix}.{ending}").read_bytes())
        for ending in ("bin", "idx")
    }
    write_facts(Path(f"{prefix}.json"), {"xxh3_128": sums})


def examine(prefix: Path) -> bool:
    """All that tools/inspect_data.py checks; False if there was no checksum to compare with."""
    corpus = IndexedDataset(prefix)
    check_index(corpus)
    contents = read_contents(corpus)
    check_ids(corpus, contents, 1000)
    recorded_tokenizer(prefix)
    return check_contents(corpus, contents)


def test_damaged_token_files(pair: Path) -> None:
    """60 of each: with checksums nothing passes; without, reading gives an error or some documents."""
    whole = IndexedDataset(pair)
    stream = whole.tokens.tolist()
    assert examine(pair)
    generator = random.Random(4)
    for ending in ("bin", "idx"):
        path = Path(f"{pair}.{ending}")
        content = path.read_bytes()
        for number in range(60):
            broken = b"" if number == 0 else damaged(content, generator)
            path.write_bytes(broken)
            if broken == content:
                continue
            with pytest.raises(DataError, match=r"a\.(bin|idx)"):
                examine(pair)
            with pytest.raises(DataError, match=r"a\.(bin|idx)"):
                merge([pair], pair.with_name("merged"))
            try:
                corpus = IndexedDataset(pair)
                documents = [corpus.document(index).tolist() for index in range(corpus.document_count)]
            except DataError as error:
                told = str(error)
                assert "a." in told
            else:
                assert len(corpus.tokens) == len(stream)
                if ending == "idx":
                    assert all(len(document) <= len(stream) for document in documents)
        path.write_bytes(content)
    assert sorted(path.name for path in pair.parent.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_headers_and_arrays_of_every_kind(pair: Path) -> None:
    path = Path(f"{pair}.idx")
    content = path.read_bytes()
    lengths, offsets, documents = 34, 34 + 4 * 50, 34 + 12 * 50
    for place, value in [
        # not 3: as int16, ids so small are the same
        *[(17, bytes([code])) for code in (0, 1, 2, 4, 5, 6, 7, 9, 255)],
        *[(18, struct.pack("<Q", count)) for count in (0, 1, 49, 51, 2**31, 2**63, 2**64 - 1)],
        *[(26, struct.pack("<Q", count)) for count in (0, 1, 50, 52, 2**63, 2**64 - 1)],
        *[(lengths + 4 * item, struct.pack("<i", -1)) for item in (0, 1, 25, 49)],
        *[(lengths + 4 * item, struct.pack("<i", 2**31 - 1)) for item in (0, 25, 49)],
        *[(offsets + 8 * item, struct.pack("<q", -2)) for item in (0, 1, 25, 49)],
        *[(offsets + 8 * item, struct.pack("<q", 2**62)) for item in (1, 25, 49)],
        *[(documents + 8 * item, struct.pack("<q", -1)) for item in (0, 1, 25, 50)],
        *[(documents + 8 * item, struct.pack("<q", 2**62)) for item in (1, 25, 50)],
    ]:
        path.write_bytes(content[:place] + value + content[place + len(value) :])
        write_side_file(pair)
        with pytest.raises(DataError, match=r"a\.(bin|idx)"):
            examine(pair)
        with pytest.raises(DataError, match=r"a\.(bin|idx)"):
            check_index(IndexedDataset(pair))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 20,
        b"[]",
        b"NaN",
        b'"text"',
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"tokenizer": 5}',
        b'{"tokenizer": {"tokenizer_type": NaN, "fingerprint": "0"}}',
        b'{"tokenizer": {"tokenizer_type": "\\ud800", "fingerprint": "0"}}',
        b'{"tokenizer": {"tokenizer_type": "ByteTokenizer", "fingerprint": "0", "vocab_file": 3}}',
        b'{"xxh3_128": "0"}',
        b'{"xxh3_128": {"bin": 1}}',
        b'{"text_bytes": NaN}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_side_files_that_are_none(pair: Path, content: bytes) -> None:
    Path(f"{pair}.json").write_bytes(content)
    for use in (examine, lambda prefix: merge([prefix], prefix.with_name("new"))):
        with pytest.raises(DataError, match=r"a\.json is not a side file"):
            use(pair)
