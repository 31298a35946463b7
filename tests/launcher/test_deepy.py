"""The launcher as its user meets it: its command line, its errors, and what the ranks are given."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[2]
MODEL = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 32\n"
PROBE = """
import os, sys
words = [os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]]
os.write(1, (" ".join(words) + "\\n").encode())  # at once: an unbuffered print of two ranks mixes its words
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a script, a model and nothing else."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "train.py").write_text(PROBE)
    (tmp_path / "tiny.yml").write_text(MODEL)
    return tmp_path


def deepy(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    fixed = {
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **fixed, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py", "tiny", "--set", "hiden_size=3"], "did you mean hidden_size?"),
        (["train.py", "tiny", "--set", "num_layers=two"], "num_layers"),
        (["train.py", "tiny", "--set", "num_attention_heads=5"], "does not divide into 5"),
        (["train.py", "missing"], "cannot read the configuration missing.yml"),
        (["absent.py", "tiny"], "there is no script absent.py"),
        (["train.py", "tiny", "-H", "hosts"], "hostfile hosts does not exist"),
        (["train.py", "tiny", "--set", "num_nodes=2"], "name a hostfile"),
        (["train.py", "tiny", "--set", "data_path=nowhere"], "no vocabulary"),
        (["train.py", "tiny", "--set", "data_path=nowhere", "tokenizer_type=ByteTokenizer"], "nowhere"),
    ],
)
def test_bad_input_is_answered_at_once_and_writes_nothing(
    folder: Path, words: list[str], message: str
) -> None:
    before = contents(folder)
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = deepy(folder, *words)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert len(run.stderr.splitlines()) == 1
    assert message in run.stderr
    assert run.stdout == ""
    assert contents(folder) == before
    spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    assert spent < 6, "seconds of a processor, which may be slow: half a second is usual"


def test_errors_import_neither_torch_nor_deepspeed(folder: Path) -> None:
    code = (
        "import sys; from megatron_lite.launcher import main; "
        "assert main(['train.py', 'tiny', '--set', 'hiden_size=3']) == 2; "
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment).returncode == 0


def test_any_script_is_started_with_the_same_files_and_overrides(folder: Path) -> None:
    (folder / "more.yml").write_text("num_gpus: 2\n")
    run = deepy(folder, "probe.py", "-d", ".", "tiny", "more.yml", "-i", "prompts.txt", "--set", "seed=5")
    assert run.returncode == 0, run.stderr
    given = "tiny.yml more.yml --set seed=5 sample_input_file=prompts.txt"
    assert sorted(run.stdout.splitlines()) == [f"{rank} 2 {given}" for rank in range(2)]


def test_the_exit_status_is_that_of_the_ranks(folder: Path) -> None:
    (folder / "probe.py").write_text("import sys; sys.exit(9)")
    run = deepy(folder, "probe.py", "tiny")
    assert run.returncode == 9
    assert "rank 0 ended with exit status 9" in run.stderr


def test_a_machine_that_is_too_small(folder: Path) -> None:
    before = contents(folder)
    run = deepy(folder, "train.py", "tiny", "--set", "hidden_size=65536", "num_layers=100", "num_gpus=2")
    assert run.returncode == 2
    assert "too small: 2 ranks need" in run.stderr
    assert "of main memory" in run.stderr
    assert "available" in run.stderr
    assert "smaller model" in run.stderr
    assert contents(folder) == before


def test_a_machine_that_is_too_small_names_keys_that_help(folder: Path) -> None:
    run = deepy(folder, "train.py", "tiny", "--set", "train_micro_batch_size_per_gpu=67108864")
    assert run.returncode == 2
    assert "--set train_micro_batch_size_per_gpu=" in run.stderr
    assert "gradient_accumulation_steps=" in run.stderr


def test_the_summary_says_what_will_run(folder: Path) -> None:
    with IndexedWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        for _ in range(10):
            writer.add([*range(256), 256])
    data = ["tokenizer_type=ByteTokenizer", "data_path=corpus", "split=8,1,1"]
    run = deepy(folder, "train.py", "tiny", "--set", *data, "num_gpus=2", "precision=bf16")
    assert run.returncode == 0, run.stderr
    lines = {line.split(maxsplit=1)[0]: line for line in run.stdout.splitlines() if line[:1].isalpha()}
    assert "2 layers of 32" in lines["model"]
    assert "2 ranks" in lines["layout"]
    assert "bf16" in lines["layout"]
    assert "attention sdpa" in lines["kernels"]
    assert "a rank" in lines["memory"]
    assert "2.06k to train on" in lines["tokens"]  # 8 of 10 documents of 257 tokens
    assert run.stdout.index("model") < run.stdout.index("0 2 tiny.yml")  # before the ranks


def test_cores_are_shared_among_the_ranks(folder: Path) -> None:
    (folder / "probe.py").write_text(
        "import os; os.write(1, (os.environ['OMP_NUM_THREADS'] + '\\n').encode())"
    )
    assert deepy(folder, "probe.py", "tiny", OMP_NUM_THREADS="3").stdout == "3\n"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, str(ROOT / "deepy.py"), "probe.py", "tiny", "--set", "num_gpus=2"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == [str(max(1, cores // 2))] * 2
    assert "OMP_NUM_THREADS" in run.stderr
