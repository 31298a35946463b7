"""Any number of ranks writes what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.tiny_runs import NEOX, make_checkpoint
from ranks import run_ranks

from megatron_lite.generation import Sampling, generate, load_model, stream
from megatron_lite.generation.replicas import load_replicas
from megatron_lite.parallel.context import context_from_environment

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["one", "", "two words", "x" * 60, "three"]
MANNERS = [Sampling(0.0), Sampling(0.9, top_p=0.9, seed=4)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    make_checkpoint(folder, **NEOX)
    return folder


def written_by_ranks(checkpoints: Path, tensor_ranks: int, step_of_others: int | None = None) -> Any:
    pieces: list[str] = []
    context = context_from_environment()
    step = None if context.is_first else step_of_others
    replicas = load_replicas(context, checkpoints, step, tensor_ranks=tensor_ranks, show=pieces.append)
    with replicas.team.led() as leads:
        if not leads:
            return pieces
        samples = [[astuple(s) for s in replicas.generate(PROMPTS, how, 12, 2, 3)] for how in MANNERS]
        replicas.stream("abc", MANNERS[1], 12)
        return samples, pieces


@pytest.mark.parametrize(("ranks", "tensor_ranks"), [(2, 2), (3, 1), (4, 2)])
def test_ranks_write_as_one(checkpoints: Path, ranks: int, tensor_ranks: int) -> None:
    model = load_model(checkpoints, torch.device("cpu"))
    expected = [[astuple(s) for s in generate(model, PROMPTS, how, 12, 2, 3)] for how in MANNERS]
    (samples, pieces), *others = run_ranks(written_by_ranks, ranks, checkpoints, tensor_ranks)
    assert samples == expected
    assert pieces == list(stream(model, "abc", MANNERS[1], 12))
    assert others == [[]] * (ranks - 1)


def test_ranks_share_the_checkpoint_that_the_first_one_found(checkpoints: Path) -> None:
    """A run may save while they load: for the others another one is the latest."""
    samples, _ = run_ranks(written_by_ranks, 2, checkpoints, 2, 0)[0]
    assert samples == run_ranks(written_by_ranks, 1, checkpoints, 1)[0][0]


def deepy(folder: Path, checkpoints: Path, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """``deepy.py generate.py -d . tiny more WORDS`` on two ranks that share the model, in ``folder``."""
    shape = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 48\n"
    (folder / "tiny.yml").write_text(f"{shape}load: {checkpoints}\n")
    (folder / "more.yml").write_text("model_parallel_size: 2\nnum_gpus: 2\ntemperature: 0.9\n")
    command = [sys.executable, str(ROOT / "deepy.py"), "generate.py", "-d", ".", "tiny", "more", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, input=typed, capture_output=True, text=True, timeout=300, env=environment
    )


def test_gpt_neox_command(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    run = deepy(tmp_path, checkpoints, "-i", "prompts.txt", "-o", "out.jsonl")
    assert run.returncode == 0, run.stderr
    found = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = load_model(checkpoints, torch.device("cpu"))
    assert found == [sample.text for sample in generate(model, ["one", "two"], Sampling(0.9), 64)]


def test_a_person_is_answered_by_two_ranks(checkpoints: Path, tmp_path: Path) -> None:
    keys = ["text_gen_type=interactive", "maximum_tokens=9"]
    run = deepy(tmp_path, checkpoints, "--set", *keys, typed="one\ntwo\n")
    assert run.returncode == 0, run.stderr
    model = load_model(checkpoints, torch.device("cpu"))
    texts = ["".join(stream(model, prompt, Sampling(0.9), 9)) for prompt in ("one", "two")]
    assert run.stdout.replace("\r", "") == f"one{texts[0]}\n\ntwo{texts[1]}\n\n".replace("\r", "")
