"""tools/evaluate.py, as typed; and GPT-NeoX's way to call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluation.local_tasks import KINDS, write_tasks
from generation.tiny_runs import tiny_config

from megatron_lite.config.summary import summary
from megatron_lite.evaluation import Choice, open_replicas
from megatron_lite.evaluation import tasks as tasks_module
from megatron_lite.evaluation.tasks import find_tasks
from megatron_lite.parallel.context import ParallelContext

ROOT = Path(__file__).resolve().parents[2]
ALONE = ParallelContext(0, 1, 0, torch.device("cpu"))
RunTool = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, of which one has no data."""
    missing = {"no_data": KINDS["tiny_choice"] | {"dataset_kwargs": {"data_files": "absent.jsonl"}}}
    return write_tasks(tmp_path_factory.mktemp("typed") / "tasks", KINDS | missing)


def test_table_and_file(
    run_tool: RunTool, checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "new" / "scores.json", tmp_path / "text.txt"
    text.write_text("A text of one document.")
    words = ["--tasks", "tiny_choice,tiny_rolling", "tiny_writing", "--include-path", folder, "--limit", 3]
    words += ["--num-fewshot", 1, "--text", text, "--output", out, "--iteration", 0]
    assert run_tool("evaluate", checkpoint, *words) == 0
    shown = capsys.readouterr().out
    replicas = open_replicas(ALONE, checkpoint, 0)
    choice = Choice(["tiny_choice", "tiny_rolling", "tiny_writing"], folder, 1, 3)
    expected = replicas.tasks(find_tasks(choice), choice)
    found = json.loads(out.read_text())
    assert found.pop("text") == {"files": [str(text)]} | replicas.text([str(text)]).as_dict()
    assert found == expected
    assert found["checkpoint"].endswith("global_step0")
    assert found["n-shot"] == dict.fromkeys(choice.tasks, 1)
    for part in ("|tiny_choice ", "|tiny_rolling", "|tiny_writing", "bits/byte", "acc_norm", str(out)):
        assert part in shown


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "tiny_choise"], "no task tiny_choise; did you mean tiny_choice?"),
        (["--tasks", "tiny_choice", "--include-path", "absent"], "no folder absent"),
        (["--tasks", "no_data"], "the data of no_data cannot be had"),
        (["--tasks", "tiny_choice", "--output", "."], "is a folder"),
        (["--tasks", "tiny_choice", "--iteration", "3"], "global_step3"),
        (["--tasks", "tiny_choice", "--model-parallel-size", "2"], "1 ranks do not divide"),
        (["other/checkpoint", "--tasks", "tiny_choice"], "one checkpoint"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_wrong_words_are_one_line(
    run_tool: RunTool,
    checkpoint: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    # lm-eval's own tasks are beside this file; to look through thousands takes seconds.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    given = words if "--include-path" in words else [*words, "--include-path", str(folder)]
    given = given if "--output" in words else [*given, "--output", "scores.json"]
    assert run_tool("evaluate", checkpoint, *given) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert named in line
    assert list(tmp_path.iterdir()) == []


def test_without_lm_eval_the_command_to_install_it_is_told(
    run_tool: RunTool, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None)
    assert run_tool("evaluate", checkpoint, "--tasks", "lambada_openai") == 2
    assert "pip install --constraint constraints.txt -r requirements-eval.txt" in capsys.readouterr().err


def test_training_says_that_it_does_not_evaluate_tasks() -> None:
    asked = summary(tiny_config(eval_tasks=["piqa", "sciq"], eval_results_prefix="out"))
    assert "piqa, sciq: not while training" in asked
    assert "tools/evaluate.py" not in summary(tiny_config())


def test_gpt_neox_command_on_two_ranks(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yml").write_text(
        f"num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 48\nload: {checkpoint}\n"
    )
    (tmp_path / "more.yml").write_text("model_parallel_size: 2\nnum_gpus: 2\n")
    tasks = [str(folder / f"{name}.yaml") for name in ("tiny_choice", "tiny_rolling")]
    command = [sys.executable, str(ROOT / "deepy.py"), "eval.py", "-d", ".", "tiny", "more"]
    run = subprocess.run(
        [*command, "--eval_tasks", *tasks, "--eval_results_prefix", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (written,) = tmp_path.glob("out_eval_results_*.json")
    found = json.loads(written.read_text())["results"]
    replicas = open_replicas(ALONE, checkpoint)
    choice = Choice(["tiny_choice", "tiny_rolling"], folder)
    expected = replicas.tasks(find_tasks(choice), choice)["results"]
    for name in choice.tasks:
        numbers = {key: value for key, value in expected[name].items() if isinstance(value, float)}
        assert {key: found[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    assert "bits_per_byte" in run.stdout
