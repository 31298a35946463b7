"""A preprocessing run that dies and is given again ends with the bytes of one that was left alone."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from kills import check_killed_runs, outputs

from megatron_lite.data.preprocessing import sources
from megatron_lite.data.preprocessing.answers import OUTPUTS
from megatron_lite.data.preprocessing.conversations import ConversationSettings
from megatron_lite.data.preprocessing.encode import Encoded, Encoder, EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.journal import Journal
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.data.preprocessing.sources import Task
from megatron_lite.data.preprocessing.transforms import TextSettings
from megatron_lite.utils.errors import DataError

ENDINGS = ("bin", "idx", "json")


@pytest.fixture
def settings(bpe_file: Path) -> EncodeSettings:
    return EncodeSettings(
        TokenizerSource("HFTokenizer", str(bpe_file)), ("text", "meta.name"), append_eod=True
    )


@pytest.fixture
def inputs(tmp_path: Path, source_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plain and compressed lines, text files: some hundred tasks."""
    monkeypatch.setattr(sources, "TASK_BYTES", 20_000)
    lines = [line for text in source_texts for line in text.split("\n")]
    content = "".join(
        json.dumps({"text": line, "meta": {"name": line[::-1]}}) + "\n" for line in lines
    ).encode()
    (tmp_path / "a.jsonl").write_bytes(content * 2)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[: len(content) // 2] + b"\n"))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


@pytest.mark.slow
def test_thirty_kills_at_random_moments(inputs: list[str], settings: EncodeSettings, tmp_path: Path) -> None:
    assert check_killed_runs(inputs, tmp_path, settings, 30) > 10


def test_kills_of_a_run_on_conversations(
    source_texts: list[str], bpe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tools/preprocess_data_with_chat_template.py``: tokens and labels, of another encoder."""
    monkeypatch.setattr(sources, "TASK_BYTES", 20_000)
    lines = [line for text in source_texts[:4] for line in text.split("\n")]
    pairs = [{"prompt": prompt, "completion": answer} for prompt, answer in pairwise(lines)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = EncodeSettings(
        TokenizerSource("HFTokenizer", str(bpe_file)),
        OUTPUTS,
        text=TextSettings(conversation=ConversationSettings()),
    )
    check_killed_runs([str(path)], tmp_path, settings, 5)


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Let runs fail after some tasks."""
    commit = Journal.commit
    done = 0

    def failing(journal: Journal) -> None:
        nonlocal done
        commit(journal)
        done += 1
        if done == commits:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", failing)


@pytest.mark.parametrize("damage", ["none", "half a line", "lost bytes", "changed byte", "journal lost"])
def test_what_a_power_cut_damages_is_done_again(
    inputs: list[str],
    settings: EncodeSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preprocess(inputs, tmp_path / "whole", settings, workers=1, on_error="skip")
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, tmp_path / "out", settings, workers=2, on_error="skip")
    folder = tmp_path / "out.partial"
    journal, tokens = folder / "journal", folder / "0.bin"
    if damage == "half a line":
        journal.write_bytes(journal.read_bytes()[:-40])
    elif damage == "lost bytes":
        os.truncate(tokens, tokens.stat().st_size // 2)
    elif damage == "changed byte":
        content = bytearray(tokens.read_bytes())
        content[len(content) // 3] ^= 1
        tokens.write_bytes(content)
    elif damage == "journal lost":
        journal.write_bytes(b"")
    capsys.readouterr()
    preprocess(inputs, tmp_path / "out", settings, workers=2, on_error="skip")
    assert ("continuing after" in capsys.readouterr().err) == (damage != "journal lost")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_worker_that_dies_is_told(
    inputs: list[str], settings: EncodeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(inputs, tmp_path / "whole", settings, workers=2, on_error="skip")
    encode = Encoder.__call__

    def dying(encoder: Encoder, task: Task) -> Encoded:
        if task.chunk == 7:
            os._exit(9)  # as the system does when memory runs out
        return encode(encoder, task)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", dying)
        with pytest.raises(DataError, match="a worker process died, most likely for want of memory"):
            preprocess(inputs, tmp_path / "out", settings, workers=2, on_error="skip")
    preprocess(inputs, tmp_path / "out", settings, workers=2, on_error="skip")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_another_command_does_not_continue(
    inputs: list[str], settings: EncodeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, tmp_path / "out", settings, workers=1)
    with pytest.raises(DataError, match=r"out\.partial is of an unfinished run with other inputs or options"):
        preprocess(inputs[:1], tmp_path / "out", settings, workers=1)
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    with pytest.raises(DataError, match="unfinished run"):
        preprocess(inputs, tmp_path / "out", settings, workers=1)
