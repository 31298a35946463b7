"""tools/generate.py and tools/convert_to_hf.py, as typed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generation.tiny_runs import NEOX, make_checkpoint
from transformers import AutoModelForCausalLM

from megatron_lite.generation import Sampling, generate, load_model

ROOT = Path(__file__).resolve().parents[2]
RunTool = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    make_checkpoint(folder, temperature=0.7, top_k=20, maximum_tokens=9, **NEOX)
    return folder


def expected(
    checkpoints: Path, prompts: list[str], sampling: Sampling, count: int, samples: int = 1
) -> list[str]:
    model = load_model(checkpoints, torch.device("cpu"))
    return [sample.text for sample in generate(model, prompts, sampling, count, samples)]


def test_one_prompt_is_streamed(
    run_tool: RunTool, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("generate", checkpoints, "--prompt", "abc", "--greedy", "--max-new-tokens", 12) == 0
    (text,) = expected(checkpoints, ["abc"], Sampling(0.0, top_k=20), 12)
    assert capsys.readouterr().out == f"abc{text}\n\n"


def test_the_runs_keys_are_the_defaults(
    run_tool: RunTool, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("generate", checkpoints, "--seed", 3) == 0
    (text,) = expected(checkpoints, [""], Sampling(0.7, top_k=20, seed=3), 9)
    assert capsys.readouterr().out == f"{text}\n\n"


def test_the_runs_keys_say_where_prompts_come_from(
    run_tool: RunTool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    make_checkpoint(
        tmp_path / "file", sample_input_file=str(prompts), num_samples=2, maximum_tokens=5, **NEOX
    )
    assert run_tool("generate", tmp_path / "file") == 0
    texts = expected(tmp_path / "file", ["one", "two"], Sampling(0.0), 5, 2)
    lines = zip(("one", "one", "two", "two"), texts, strict=True)
    assert capsys.readouterr().out == "".join(f"{prompt}{text}\n---\n" for prompt, text in lines)

    written = tmp_path / "samples.jsonl"
    keys = {"sample_input_file": str(prompts), "sample_output_file": str(written), "maximum_tokens": 5}
    make_checkpoint(tmp_path / "written", **keys, **NEOX)
    assert run_tool("generate", tmp_path / "written") == 0
    assert [json.loads(line)["text"] for line in written.read_text().splitlines()] == texts[::2]
    capsys.readouterr()

    make_checkpoint(tmp_path / "person", text_gen_type="interactive", maximum_tokens=5, **NEOX)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert run_tool("generate", tmp_path / "person") == 0
    assert capsys.readouterr().out == f"one{texts[0]}\n\n"


def test_a_file_of_prompts_to_json_lines(run_tool: RunTool, checkpoints: Path, tmp_path: Path) -> None:
    prompts = ["first", "zweiter 漢字", ""]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    words = ["--num-samples", 2, "--top-p", 0.9, "--repetition-penalty", 1.2, "--no-repeat-ngram-size", 3]
    out = tmp_path / "samples.jsonl"
    assert (
        run_tool(
            "generate", checkpoints, "--prompt-file", tmp_path / "prompts.txt", *words, "--output-file", out
        )
        == 0
    )
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == [prompt for prompt in prompts for _ in range(2)]
    sampling = Sampling(0.7, 20, 0.9, 1.2, 3)
    assert [line["text"] for line in lines] == expected(checkpoints, prompts, sampling, 9, 2)
    assert all(line["tokens"] == 9 or line["finished"] for line in lines)


def test_interactive_answers_each_line(
    run_tool: RunTool, checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert run_tool("generate", checkpoints, "--interactive", "--greedy") == 0
    one, two = expected(checkpoints, ["one", "two"], Sampling(0.0), 9)
    assert capsys.readouterr().out == f"one{one}\n\ntwo{two}\n\n"


def test_another_step(run_tool: RunTool, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for step in (0, 7):
        assert run_tool("generate", checkpoints, "--prompt", "abc", "--greedy", "--iteration", step) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--top-p", "1.5"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--prompt-file", "absent.txt"], "absent.txt"),
        (["--prompt-file", "empty.txt"], "empty"),
        (["--prompt-file", "latin1.txt"], "not UTF-8"),
        (["--iteration", "3"], "global_step3"),
    ],
)
def test_wrong_words_are_one_line(
    run_tool: RunTool,
    checkpoints: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("Grüße\n".encode("latin1"))
    out = tmp_path / "samples.jsonl"
    assert run_tool("generate", checkpoints, *words, "--output-file", out) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert named in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not out.exists()


def test_convert_and_verify(
    run_tool: RunTool, checkpoints: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    assert run_tool("convert_to_hf", checkpoints, out, "--max-shard-size", "50KB", "--verify") == 0
    assert "verified: largest logit difference" in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) > 1
    tokens = torch.arange(30)[None]
    ours = load_model(checkpoints, torch.device("cpu")).gpt(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert run_tool("convert_to_hf", checkpoints, out) == 2
    assert "already there" in capsys.readouterr().err


def test_convert_bf16_of_an_earlier_step(run_tool: RunTool, checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert run_tool("convert_to_hf", checkpoints, out, "--dtype", "bf16", "--iteration", 0, "--verify") == 0
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_damaged_checkpoint_is_refused(
    run_tool: RunTool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "run", **NEOX)
    for file in (tmp_path / "run" / "global_step7").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    for tool, words in (("convert_to_hf", [tmp_path / "hf"]), ("generate", ["--prompt", "a"])):
        assert run_tool(tool, tmp_path / "run", *words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "hf").exists()


def test_as_a_command_of_its_own(checkpoints: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), str(checkpoints), "--max-new-tokens", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "whole number above 0" in result.stderr
