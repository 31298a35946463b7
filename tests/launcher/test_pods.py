"""Kubernetes: from the variables of a pod to the ranks in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.pods import Pods, pods_from_environment, ranks_of_lone_pod
from megatron_lite.launcher.resources import find_resources
from megatron_lite.planner import Gpu, Machine
from megatron_lite.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CPU = Machine(cores=4, memory_total=1 << 34, memory_available=1 << 34)
GPUS = Machine(4, 1 << 34, 1 << 34, gpus=(Gpu("x", 1 << 34, 1 << 34),) * 4)
ADDRESS = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
PYTORCH_JOB = {
    **ADDRESS, "WORLD_SIZE": "6", "RANK": "1", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456",
    "PET_NNODES": "3", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2",
}  # fmt: skip
"""As Kubeflow's training operator sets them for `nprocPerNode: "2"`: WORLD_SIZE counts ranks, RANK pods."""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (PYTORCH_JOB, Pods(3, 1, "job-master-0", 23456, 2)),
        ({**PYTORCH_JOB, "PET_NPROC_PER_NODE": "auto"}, Pods(3, 1, "job-master-0", 23456, None)),
        ({**ADDRESS, "WORLD_SIZE": "3", "RANK": "2"}, Pods(3, 2, "job-master-0", 23456, None)),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a", "PET_NPROC_PER_NODE": "gpu"},
            Pods(2, 0, "a", 29500, None),
        ),
        ({**ADDRESS, "NNODES": "4", "JOB_COMPLETION_INDEX": "3"}, Pods(4, 3, "job-master-0", 23456, None)),
        ({**ADDRESS, "WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "3", "RANK": "2"}, None),
        ({**ADDRESS}, None),
    ],
)
def test_who_sets_what(variables: dict[str, str], expected: Pods | None) -> None:
    assert pods_from_environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**PYTORCH_JOB, "PET_NNODES": "1:4"}, "torchrun's job"),
        ({**PYTORCH_JOB, "PET_NODE_RANK": "first"}, "PET_NODE_RANK is 'first'"),
        ({**ADDRESS, "NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK 2 and NNODES 2"),
    ],
)
def test_contradictions(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pods_from_environment(variables)


def test_the_ranks_of_a_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLTS_HOSTFILE", str(tmp_path / "none"))
    for name, value in {**PYTORCH_JOB, "PET_NPROC_PER_NODE": "auto"}.items():
        monkeypatch.setenv(name, value)
    resources = find_resources(LauncherSection(), GPUS)
    assert (resources.ranks, resources.ranks_here, resources.several) == (12, 4, False)
    assert find_resources(LauncherSection(num_gpus=2), GPUS).ranks == 6
    assert find_resources(LauncherSection(), CPU).ranks == 3
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    with pytest.raises(ConfigError, match="4 GPUs"):
        find_resources(LauncherSection(), GPUS)
    with pytest.raises(ConfigError, match="3 pods"):
        find_resources(LauncherSection(num_nodes=2), CPU)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"}, 4),
        ({**PYTORCH_JOB, "PET_NNODES": "1", "PET_NODE_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, 2),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, None),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"}, None),
        ({"PET_NPROC_PER_NODE": "4"}, None),
    ],
)
def test_the_ranks_of_a_single_pod(
    variables: dict[str, str], ranks: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ranks_of_lone_pod(variables) == ranks
    for name, value in {"DLTS_HOSTFILE": str(tmp_path / "none"), **variables}.items():
        monkeypatch.setenv(name, value)
    resources = find_resources(LauncherSection(), CPU)
    assert (resources.ranks, resources.pods) == (ranks or 1, None)
    assert find_resources(LauncherSection(num_gpus=3), CPU).ranks == 3


def test_the_manifest_describes_a_job_that_finds_itself() -> None:
    service, job = yaml.safe_load_all((ROOT / "docs/kubernetes.yml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    seen = [
        pods_from_environment({**variables, "JOB_COMPLETION_INDEX": str(index)})
        for index in range(spec["completions"])
    ]
    first_pod = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert seen == [Pods(spec["parallelism"], index, first_pod, 29500, None) for index in range(len(seen))]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_deepy_starts_the_ranks_of_its_pod(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    (tmp_path / "probe.py").write_text(
        f"import os; os.write(1, (' '.join(os.environ[name] for name in {names}) + '\\n').encode())"
    )
    (tmp_path / "tiny.yml").write_text(
        "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 32\n"
    )
    run = subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), "probe.py", "tiny"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **PYTORCH_JOB},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == [
        "2 0 6 2 job-master-0 23456",
        "3 1 6 2 job-master-0 23456",
    ]
