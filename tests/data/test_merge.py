"""Merged token files hold the documents of their parts, in order; what does not fit together is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import indexed, merging
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, write_index
from megatron_lite.data.merging import merge
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def documents_in(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.document_count)]


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@st.composite
def parts(draw: st.DrawFn) -> tuple[str, list[list[int]]]:
    """A dtype, and documents with a token at least."""
    dtype = draw(st.sampled_from(["<u1", "<i1", "<u2", "<i2", "<i4", "<i8"]))
    ids = st.integers(0, int(np.iinfo(dtype).max))
    documents = draw(st.lists(st.lists(ids, max_size=6), min_size=1, max_size=6))
    return dtype, [*documents, [draw(ids)]]


@settings(max_examples=60)
@given(corpora=st.lists(parts(), min_size=1, max_size=4), chunk=st.sampled_from([1, 3, 1000]))
def test_documents_of_all_parts_in_order(
    corpora: list[tuple[str, list[list[int]]]], chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [
        write(folder / f"part{number}", documents, dtype) for number, (dtype, documents) in enumerate(corpora)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "POINTER_CHUNK", chunk)
        patch.setattr(merging, "COPY_BYTES", 8 * chunk)
        merge(prefixes, folder / "all")
    expected = [document for _, documents in corpora for document in documents]
    assert documents_in(folder / "all") == expected
    kinds = {np.dtype(dtype) for dtype, _ in corpora}
    if len(kinds) == 1:
        assert IndexedDataset(folder / "all").dtype in kinds
    write(folder / "at once", expected, IndexedDataset(folder / "all").dtype.str)
    for ending in (".bin", ".idx"):
        assert (folder / f"all{ending}").read_bytes() == (folder / f"at once{ending}").read_bytes()
    facts = json.loads((folder / "all.json").read_text())
    flat = [index for document in expected for index in document]
    assert (facts["tokens"], facts["documents"]) == (len(flat), len(expected))
    assert (facts["smallest"], facts["largest"]) == (min(flat), max(flat))
    assert facts["xxh3_128"] == {
        ending: xxhash.xxh3_128_hexdigest((folder / f"all.{ending}").read_bytes())
        for ending in ("bin", "idx")
    }


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron's files may have sentences in a document."""
    for name, lengths, boundaries in (("a", [2, 0, 3], [0, 2, 3]), ("b", [1, 1], [0, 0, 2])):
        np.arange(sum(lengths), dtype="<u2").tofile(tmp_path / f"{name}.bin")
        arrays = [np.array(lengths, "<i4")], [np.array(boundaries, "<i8")]
        write_index(tmp_path / f"{name}.idx", np.dtype("<u2"), *arrays)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    merged = IndexedDataset(tmp_path / "all")
    assert documents_in(tmp_path / "all") == [[0, 1], [2, 3, 4], [], [0, 1]]
    assert merged.lengths.tolist() == [2, 0, 3, 1, 1]
    assert merged.documents.tolist() == [0, 2, 3, 3, 5]


@pytest.fixture
def encoded(tmp_path: Path) -> dict[str, Path]:
    """Files of two tokenizers with side files."""
    made = {}
    for name, kind in (("a", "ByteTokenizer"), ("b", "ByteTokenizer"), ("c", "CharLevelTokenizer")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"some {name} text"}) + "\n")
        settings = EncodeSettings(TokenizerSource(kind), append_eod=True)
        report = preprocess([str(tmp_path / f"{name}.jsonl")], tmp_path / "in" / name, settings, workers=1)
        made[name] = report.prefixes["text"]
    return made


def test_the_side_file_and_its_checks(encoded: dict[str, Path], tmp_path: Path) -> None:
    merge([encoded["b"], encoded["a"]], tmp_path / "all")
    facts = json.loads((tmp_path / "all.json").read_text())
    side_files = [json.loads(Path(f"{encoded[name]}.json").read_text()) for name in "ba"]
    assert facts["tokenizer"] == side_files[0]["tokenizer"]
    assert facts["text_bytes"] == 22
    assert [source["prefix"] for source in facts["sources"]] == [str(encoded["b"]), str(encoded["a"])]
    assert [source["sources"] for source in facts["sources"]] == [each["sources"] for each in side_files]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(
        DataError, match=r"c_text_document was encoded by another tokenizer \(CharLevelTokenizer\)"
    ):
        merge([encoded["a"], encoded["c"]], tmp_path / "new")
    with pytest.raises(DataError, match="a_text_document is given twice"):
        merge([encoded["a"], encoded["b"], encoded["a"]], tmp_path / "new")
    with pytest.raises(DataError, match=r"all\.bin exists and is left as it is"):
        merge([encoded["a"]], tmp_path / "all")
    tokens = Path(f"{encoded['b']}.bin")
    tokens.write_bytes(b"x" + tokens.read_bytes()[1:])
    with pytest.raises(DataError, match=r"b_text_document\.bin is not what b_text_document\.json says"):
        merge([encoded["a"], encoded["b"]], tmp_path / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_megatrons_flags(encoded: dict[str, Path], tmp_path: Path) -> None:
    for ending in ("bin", "idx", "json"):
        Path(f"{encoded['c']}.{ending}").unlink()
    write(tmp_path / "in" / "z", [[1, 2]])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/merge_data.py"), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}
        )

    result = run("--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "all"))
    assert result.returncode == 0, result.stderr
    assert "3 documents" in result.stdout
    assert "no side file tells the tokenizer of" in result.stderr
    parts = [encoded["a"], encoded["b"], tmp_path / "in" / "z"]
    assert documents_in(tmp_path / "all") == [document for part in parts for document in documents_in(part)]
    (tmp_path / "in" / "z.idx").unlink()
    for folder, message in (("in", "z.idx is missing"), ("none", "no such folder"), (".", "error: ")):
        result = run("--input", str(tmp_path / folder), "--output-prefix", str(tmp_path / "in" / "new"))
        if folder != ".":
            assert result.returncode == 2
            assert message in result.stderr
