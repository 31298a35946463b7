"""Back ends: what was logged can be read back with each back end's own reader."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lite.config import Config, config_from_keys
from megatron_lite.metrics import BACKENDS, open_backends
from megatron_lite.metrics.jsonl import JsonLines, read_jsonl
from megatron_lite.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def config_with(**keys: Any) -> Config:
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, "train_iters": 1}
    return config_from_keys(shape | keys, world_size=1)


def test_jsonl_is_kept_by_every_run(tmp_path: Path) -> None:
    (backend,) = open_backends(config_with(), tmp_path / "new" / "run")
    before = time.time()
    backend.log(10, {"train/loss": 2.5, "train/lr": 1e-3})
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()  # there before close
    backend.close()
    (line,) = map(json.loads, lines)
    assert before - 0.01 <= line.pop("time") <= time.time() + 0.01
    assert line == {"step": 10, "train/loss": 2.5, "train/lr": 1e-3}


def test_jsonl_appends_and_drops_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.log(1, {"train/loss": 3.0})
    first.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "train/l')  # killed while writing
    second = JsonLines(path)
    second.log(2, {"train/loss": 2.0})
    second.close()
    assert [(line["step"], line["train/loss"]) for line in read_jsonl(path)] == [(1, 3.0), (2, 2.0)]


def test_jsonl_stays_json_when_the_loss_is_no_number(tmp_path: Path) -> None:
    backend = JsonLines(tmp_path / "metrics.jsonl")
    backend.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    backend.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["train/loss"] is None
    assert line["train/grad_norm"] is None


@pytest.mark.parametrize("content", ["no json\n", "[1, 2]\n", '{"loss": 1}\n', '{"step": "a"}\n'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + content)
    with pytest.raises(DataError, match="line 2"):
        list(read_jsonl(path))


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    config = config_with(tensorboard_dir=str(tmp_path / "board"))
    backends = open_backends(config, tmp_path / "run")
    assert len(backends) == 2
    for step in (1, 2):
        for backend in backends:
            backend.log(step, {"train/loss": 1.0 / step, "valid/loss": 2.0})
    for backend in backends:
        backend.close()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "valid/loss"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


RUN = """
import sys
from pathlib import Path
from megatron_lite.config import config_from_keys
from megatron_lite.metrics import open_backends
from megatron_lite.utils.errors import command_line

@command_line
def main():
    keys = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, "train_iters": 1}
    keys |= {"use_wandb": True, "wandb_project": "tiny", "wandb_group": "tests", "wandb_run_name": "first"}
    backends = open_backends(config_from_keys(keys), Path(sys.argv[1]))
    assert len(backends) == 2
    for step in (5, 6, 4):  # a resumed run goes back
        backends[-1].log(step, {"train/loss": step / 8})
    for backend in backends:
        backend.close()

sys.exit(main())
"""


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: wandb leaves a service and its settings behind.
    home = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_API_KEY": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder / "run")],
        env=os.environ | home | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_wandb_offline_keeps_everything(tmp_path: Path) -> None:
    result = run_python(RUN, tmp_path, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    history, run = read_wandb_file(file)
    assert [(row["step"], row["train/loss"]) for row in history] == [(5, 0.625), (6, 0.75), (4, 0.5)]
    assert (run.project, run.run_group, run.display_name) == ("tiny", "tests", "first")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["hidden_size"] == 8


def read_wandb_file(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """The history rows and the run record of a W&B transaction log."""
    from wandb.proto import wandb_internal_pb2

    history, run = [], None
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif kind == "run":
            run = record.run
    return history, run


def leveldb_records(content: bytes, block: int = 1 << 15, file_header: int = 7) -> Iterator[bytes]:
    """The records of a LevelDB log (its doc/log_format.md): checksum, u16 length, type, data, in blocks."""
    position, parts = file_header, b""
    while position + 7 <= len(content):
        if block - position % block < 7:  # the rest of a block, too short for a header
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_without_login_is_one_sentence(tmp_path: Path) -> None:
    result = run_python(RUN, tmp_path, WANDB_MODE="online")
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "use_wandb" in line
    assert "wandb login" in line


def test_only_the_first_rank_opens_back_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert open_backends(config_with(tensorboard_dir=str(tmp_path / "board")), tmp_path / "run") == []
    assert list(tmp_path.iterdir()) == []


def test_a_back_end_is_one_line_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []

    class Mine:
        def log(self, step: int, values: Any) -> None:
            seen.append((step, values["a"]))

        def close(self) -> None:
            seen.append((-1, 0.0))

    monkeypatch.setitem(BACKENDS, "mine", lambda config, run_dir: Mine())
    backends = open_backends(config_with(), tmp_path)
    backends[-1].log(3, {"a": 1.5})
    backends[-1].close()
    assert seen == [(3, 1.5), (-1, 0.0)]


def test_an_unwritable_run_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_backends(config_with(), tmp_path / "file" / "run")
