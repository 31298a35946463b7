"""The command line of srun, and the signals that it gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.resources import find_resources
from megatron_lite.launcher.slurm import slurm_command
from megatron_lite.planner import Machine
from megatron_lite.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CPU = Machine(cores=4, memory_total=1 << 34, memory_available=1 << 34)
FAKE_SRUN = """#!/bin/bash
trap 'echo asked to stop; exit 0' USR2
trap 'exit 7' TERM INT
echo "meet ${MASTER_ADDR-anywhere}:${MASTER_PORT-any} $@"
while :; do sleep 0.05; done
"""


@pytest.fixture(autouse=True)
def _srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text(FAKE_SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def words(tmp_path: Path, hosts: str, environment: dict[str, str] | None = None, **given: Any) -> list[str]:
    (tmp_path / "hosts").write_text(hosts)
    keys = LauncherSection(launcher="slurm", hostfile=str(tmp_path / "hosts"), **given)
    return slurm_command(keys, find_resources(keys, CPU), ["python", "train.py"], environment or {})


def test_srun_places_the_ranks_as_the_hostfile_does(tmp_path: Path) -> None:
    """Told only their number, it put all on the first host that had the cores."""
    given = words(tmp_path, "alpha slots=2\nbeta slots=2\n", {"SLURM_CPUS_PER_TASK": "6"}, account="lab")
    assert given[0] == "srun"
    assert {"--nodes=2", "--nodelist=alpha,beta", "--ntasks=4", "--ntasks-per-node=2"} <= set(given)
    assert {"--kill-on-bad-exit=1", "--export=ALL", "--cpus-per-task=6", "--account=lab"} <= set(given)
    assert given[-2:] == ["python", "train.py"]


def test_further_arguments_win(tmp_path: Path) -> None:
    given = words(tmp_path, "alpha slots=2\nbeta slots=2\n", launcher_args="--label --kill-on-bad-exit=0")
    assert given[-4:] == ["--label", "--kill-on-bad-exit=0", "python", "train.py"]


@pytest.mark.parametrize(
    ("given", "hosts", "ranks"),
    [
        ({"num_nodes": 1, "force_multi": True}, "alpha", 2),
        ({"num_gpus": 1}, "alpha,beta", 2),
        ({"exclude": "alpha"}, "beta", 2),
    ],
)
def test_whole_hosts_and_fewer_ranks_are_possible(
    tmp_path: Path, given: dict[str, Any], hosts: str, ranks: int
) -> None:
    made = words(tmp_path, "alpha slots=2\nbeta slots=2\n", **given)
    assert {f"--nodelist={hosts}", f"--ntasks={ranks}"} <= set(made)


@pytest.mark.parametrize(
    ("hosts", "given"), [("alpha slots=2\nbeta slots=4\n", {}), ("alpha slots=2\n", {"include": "alpha:1"})]
)
def test_what_it_cannot_do(tmp_path: Path, hosts: str, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"launcher slurm starts \d ranks on every host"):
        words(tmp_path, hosts, **given)


def test_without_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="srun is not installed"):
        words(tmp_path, "alpha slots=2\n")


def test_a_signal_lets_the_ranks_save(tmp_path: Path) -> None:
    """At SIGINT and SIGTERM srun kills its tasks; and it, not the hostfile, knows where rank 0 is."""
    (tmp_path / "probe.py").touch()
    (tmp_path / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    model = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 32\n"
    (tmp_path / "tiny.yml").write_text(f"{model}launcher: slurm\nhostfile: hosts\nmaster_port: 4000\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "deepy.py"), "probe.py", "tiny"],
        cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = next(line for line in iter(process.stdout.readline, "") if line.startswith("meet"))
        assert line.startswith("meet anywhere:4000 --nodes=2")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "asked to stop\n"), err
