"""Bad input through the real commands: one sentence, exit status 2, nothing written, nothing overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lite.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 16,
    "pos_emb": "rotary",
    "tokenizer_type": "ByteTokenizer",
    "train_batch_size": 2,
    "train_iters": 2,
    "split": "1,1,0",
    "eval_iters": 1,
}
LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d)); "
LIMITED += (
    "sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def write_data(prefix: Path, tokens: int = 400, highest: int = 255) -> None:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(2):
            writer.add(np.full(tokens, highest, dtype=np.uint16))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with data and a configuration that works."""
    write_data(tmp_path / "data")
    keys = {**KEYS, "data_path": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(keys))
    return tmp_path


def command(*words: object, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the project; ``file_limit`` bytes a file stand for a disk that is full."""
    start = [] if file_limit is None else ["-c", LIMITED % (file_limit, file_limit)]
    return subprocess.run(
        [sys.executable, *start, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def train(run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    extra = ["--set", *overrides] if overrides else []
    return command("deepy.py", "train.py", run / "run.yml", *extra)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """It ended with status 2 and one error line that holds ``words``, and no traceback."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hiden_size=32", ("hiden_size", "hidden_size")),
        ("num_layers=two", ("num_layers", "two")),
        ("num_attention_heads=3", ("16", "3 heads")),
        ("data_path=/nowhere/data", ("/nowhere/data",)),
    ],
)
def test_wrong_keys(run: Path, override: str, words: tuple[str, ...]) -> None:
    before = files(run)
    refused(train(run, override), *words)
    assert files(run) == before


def damage_truncated(run: Path) -> str:
    path = run / "data.bin"
    path.write_bytes(path.read_bytes()[:-100])
    return "data.bin"


def damage_foreign_index(run: Path) -> str:
    (run / "data.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    return "data.idx"


def damage_ids(run: Path) -> str:
    write_data(run / "high", highest=1000)
    for suffix in (".bin", ".idx"):
        (run / f"high{suffix}").replace(run / f"data{suffix}")
    return "1000"


def damage_empty(run: Path) -> str:
    write_data(run / "none", tokens=0)
    for suffix in (".bin", ".idx"):
        (run / f"none{suffix}").replace(run / f"data{suffix}")
    return "data"


@pytest.mark.parametrize("damage", [damage_truncated, damage_foreign_index, damage_ids, damage_empty])
def test_bad_data(run: Path, damage: object) -> None:
    word = damage(run)  # type: ignore[operator]
    before = files(run)
    refused(train(run), word)
    assert files(run) == before


def test_a_corrupt_checkpoint(run: Path) -> None:
    assert train(run).returncode == 0
    (weights,) = (run / "run" / "checkpoints").rglob("weights_*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-20] ^= 255
    weights.write_bytes(content)
    before = files(run)
    refused(train(run, f"load={run}/run/checkpoints", "train_iters=4"), weights.name)
    refused(command("tools/generate.py", run / "run/checkpoints", "--prompt", "a"), weights.name)
    refused(command("tools/convert_to_hf.py", run / "run/checkpoints", run / "hf"), weights.name)
    assert files(run) == before


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("")
    words = ["--input", tmp_path / "text.jsonl", "--tokenizer-type", "ByteTokenizer"]
    refused(command("tools/preprocess_data.py", *words, "--output-prefix", tmp_path / "out"), "text.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_a_full_disk_while_preprocessing(tmp_path: Path) -> None:
    lines = (json.dumps({"text": "some text " * 50}) for _ in range(200))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = ["--input", tmp_path / "text.jsonl", "--tokenizer-type", "ByteTokenizer"]
    words += ["--output-prefix", tmp_path / "out"]
    refused(command("tools/preprocess_data.py", *words, file_limit=10_000), "File too large")
    assert not list(tmp_path.glob("out*.bin")) + list(tmp_path.glob("out*.idx"))


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(run: Path) -> None:
    assert train(run).returncode == 0
    checkpoints = run / "run" / "checkpoints"
    before = files(checkpoints)
    largest = max(len(content) for content in before.values())
    overrides = [f"load={checkpoints}", "train_iters=4"]
    limited = command("train.py", run / "run.yml", "--set", *overrides, file_limit=largest // 2)
    refused(limited, "File too large")
    assert files(checkpoints) == before
