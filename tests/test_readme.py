"""The README's commands run as they are typed, on a small text and with small models."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

SMALL = """num_layers=1 hidden_size=32 num_attention_heads=2 num_kv_heads=2 seq_length=32
max_position_embeddings=32 train_batch_size=2 train_micro_batch_size_per_gpu=1 train_iters=3 lr_decay_iters=3
eval_iters=1 log_interval=1"""

PROVEN_ELSEWHERE = {
    "make demo": "it is the tour below in one command; CI would train for minutes",
    "make test": "it is what runs this test",
    "source .venv/bin/activate": "nothing of ours",
}


def commands() -> list[str]:
    """Every command of the README's bash blocks, continued lines joined, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [stripped for line in lines if (stripped := line.split(" #")[0].strip())]


def small(command: str, folder: Path, name: str = "other") -> list[str]:
    """``command`` with its files in ``folder`` and, where it trains, a small model and the run ``name``."""
    words = [
        re.sub(r"^(mytext|data/|runs/)", lambda match: f"{folder}/{match[1]}", word)
        for word in shlex.split(command)
    ]
    if "train.py" in words:
        ranks = 2 if {"num_gpus=2", "--nproc-per-node"} & set(words) else 1
        words = [str(folder / "local_setup.yml") if "local_setup" in word else word for word in words]
        words = [word for word in words if not word.startswith("train_iters=")]
        words += [] if "--set" in words else ["--set"]
        words += [
            *SMALL.split(),
            f"gradient_accumulation_steps={2 // ranks}",
            f"run_dir={folder}/runs/{name}",
        ]
    if "train_tokenizer.py" in command:
        words[words.index("--vocab-size") + 1] = "300"
    if "--interactive" not in words and "generate.py" in command:
        words += ["--max-new-tokens", "4"]
    program = Path(sys.executable).parent / words[0]
    return [sys.executable if words[0] == "python" else str(program), *words[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and ``local_setup.yml`` with its paths in the folder; ``runs/demo`` is a small run."""
    folder = tmp_path_factory.mktemp("readme")
    texts = [paragraph for paragraph in README.split("\n\n") for _ in range(20)]
    (folder / "mytext.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    setup = yaml.safe_load((ROOT / "configs/local_setup.yml").read_text())
    for key in ("data_path", "vocab_file", "save", "load", "tensorboard_dir"):
        setup[key] = str(folder / setup[key])
    (folder / "local_setup.yml").write_text(yaml.safe_dump(setup))
    run(small("python deepy.py train.py configs/demo.yml", folder, "demo"))
    return folder


def run(words: list[str]) -> None:
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, input="")
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in commands() if each not in PROVEN_ELSEWHERE])
def test_command(command: str, folder: Path) -> None:
    run(small(command, folder))


def test_no_excuse_is_stale() -> None:
    assert set(PROVEN_ELSEWHERE) <= set(commands())


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
