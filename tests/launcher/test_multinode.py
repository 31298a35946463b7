"""Which hosts take part, and what reaches the launcher that starts their ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher import command
from megatron_lite.launcher.multinode import start_on_hosts
from megatron_lite.launcher.resources import find_resources, launcher_keys, with_chosen_gpus
from megatron_lite.planner import Gpu, Machine
from megatron_lite.utils.errors import ConfigError
from megatron_lite.utils.log import LOGGER

ROOT = Path(__file__).resolve().parents[2]
CPU = Machine(cores=4, memory_total=1 << 34, memory_available=1 << 34)
GPUS = Machine(
    cores=4, memory_total=1 << 34, memory_available=1 << 34, gpus=(Gpu("x", 1 << 34, 1 << 34),) * 4
)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# two machines\nalpha slots=4\nbeta slots=4\n")
    return str(path)


@pytest.fixture(autouse=True)
def _no_default_hostfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLTS_HOSTFILE", str(tmp_path / "none"))


def keys(**values: Any) -> LauncherSection:
    return LauncherSection(**values)


@pytest.mark.parametrize(
    ("machine", "given", "ranks"),
    [(CPU, {}, 1), (CPU, {"num_gpus": 3}, 3), (GPUS, {}, 4), (GPUS, {"num_gpus": 2}, 2)],
)
def test_ranks_of_one_machine(machine: Machine, given: dict[str, int], ranks: int) -> None:
    resources = find_resources(keys(**given), machine)
    assert (resources.ranks, resources.several) == (ranks, False)


def test_slots_of_one_machine_picked_by_name() -> None:
    resources = find_resources(keys(include="localhost:1,3"), GPUS)
    assert resources.hosts == {"localhost": [1, 3]}
    assert resources.chosen
    assert not resources.several


@pytest.mark.parametrize(("visible", "shown"), [(None, "1,3"), ("7, 6,5,4", "6,4")])
def test_the_chosen_slots_are_those_of_the_visible_gpus(
    visible: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    resources = find_resources(keys(include="localhost:1,3"), GPUS)
    assert command._environment(resources, GPUS)["CUDA_VISIBLE_DEVICES"] == shown


def test_only_the_chosen_gpus_count_for_memory(hostfile: str, tmp_path: Path) -> None:
    machine = replace(GPUS, gpus=tuple(Gpu(str(slot), 1 << 34, slot << 30) for slot in range(4)))

    def names(**given: Any) -> list[str]:
        return [gpu.name for gpu in with_chosen_gpus(machine, find_resources(keys(**given), machine)).gpus]

    assert names(include="localhost:1,3") == ["1", "3"]
    assert names(exclude="localhost:0") == ["1", "2", "3"]
    assert names(num_gpus=2) == ["0", "1"]
    assert names(hostfile=hostfile, include="alpha:2") == ["2"]
    assert names(hostfile=hostfile) == [
        "0",
        "1",
        "2",
        "3",
    ]  # other hosts: not narrowed
    path = tmp_path / "large"
    path.write_text("alpha slots=8\n")
    with pytest.raises(ConfigError, match="slot 7 of alpha: 4 GPUs are visible"):
        names(hostfile=str(path))


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, {"alpha": 4, "beta": 4}),
        ({"num_nodes": 1}, {"alpha": 4}),
        ({"num_gpus": 2}, {"alpha": 2, "beta": 2}),
        ({"include": "beta:0,3"}, {"beta": 2}),
        ({"exclude": "alpha:1"}, {"alpha": 3, "beta": 4}),
    ],
)
def test_hosts_of_a_hostfile(hostfile: str, given: dict[str, Any], hosts: dict[str, int]) -> None:
    resources = find_resources(keys(hostfile=hostfile, **given), CPU)
    assert {host: len(slots) for host, slots in resources.hosts.items()} == hosts
    assert resources.ranks == sum(hosts.values())
    assert resources.several == (len(hosts) > 1)


def test_the_default_hostfile(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTS_HOSTFILE", hostfile)
    assert find_resources(keys(), CPU).ranks == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_nodes": 2}, "hostfile"),
        ({"force_multi": True}, "hostfile"),
        ({"num_gpus": 5}, "4 GPUs are visible"),
        ({"include": "elsewhere:0"}, "elsewhere"),
        ({"include": "localhost:9"}, "slot"),
        ({"include": "localhost:0", "exclude": "localhost:1"}, "exclusive"),
    ],
)
def test_what_is_not_there(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_resources(keys(**given), GPUS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_gpus": 5}, "num_gpus is 5, but .* gives alpha slots=4"),
        ({"num_nodes": 3}, "num_nodes is 3, but .* names 2 hosts"),
        ({"num_nodes": 5, "num_gpus": 16}, "num_nodes is 5"),
    ],
)
def test_more_than_the_hostfile_has(hostfile: str, given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_resources(keys(hostfile=hostfile, **given), CPU)


def test_a_hostfile_that_is_left_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-NeoX's examples name /mock_path; what was typed, or needs other hosts, must be there."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING, LOGGER.name)
    path = tmp_path / "run.yml"
    path.write_text("hostfile: /mock_path\n")
    resources = find_resources(launcher_keys([path], ["num_gpus=2"]), CPU)
    assert (resources.ranks, resources.several, resources.hostfile) == (2, False, None)
    assert "hostfile /mock_path does not exist" in caplog.text
    for override in ("num_nodes=2", "force_multi=true"):
        with pytest.raises(ConfigError, match="hostfile /mock_path does not exist"):
            find_resources(launcher_keys([path], [override]), CPU)
    with pytest.raises(ConfigError, match="hostfile /typed does not exist"):
        launcher_keys([path], ["hostfile=/typed"])


def test_a_bad_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_text("alpha four\n")
    with pytest.raises(ConfigError, match="bad entry"):
        find_resources(keys(hostfile=str(path)), CPU)


def test_keys_are_read_before_the_number_of_ranks_is_known(tmp_path: Path) -> None:
    """A batch that divides only by the ranks of the hostfile must not stop the reading of its key."""
    path = tmp_path / "run.yml"
    path.write_text("train_batch_size: 7\nnum-gpus: 7\nhostfile: /some/where\n")
    section = launcher_keys([path], ["num_nodes=3"])
    assert (section.num_gpus, section.hostfile, section.num_nodes) == (7, "/some/where", 3)


def test_a_launcher_that_is_not_installed(
    hostfile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "")
    section = keys(hostfile=hostfile)
    with pytest.raises(ConfigError, match=r"launcher pdsh: ssh is not installed"):
        start_on_hosts(section, find_resources(section, CPU), "train.py", ["a.yml"])


FAKE_HYDRA = """#!/bin/bash
trap 'kill -9 $$' TERM
echo $$
while :; do sleep 0.1; done
"""


def test_a_launcher_that_a_signal_ends(hostfile: str, tmp_path: Path) -> None:
    """It gets the SIGTERM that we get; its end by signal 9 is no success."""
    (tmp_path / "mpiexec.hydra").write_text(FAKE_HYDRA)
    (tmp_path / "mpiexec.hydra").chmod(0o755)
    (tmp_path / "probe.py").touch()
    (tmp_path / "tiny.yml").write_text(
        "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 32\nlauncher: mpich\n"
    )
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "deepy.py"), "probe.py", "tiny", "-H", hostfile],
        cwd=tmp_path,
        env={**os.environ, **own},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    started = next((int(line) for line in lines if line.strip().isdigit()), None)
    try:
        assert started is not None, process.communicate()[1]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
        if started is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGKILL, err
    assert "SIGTERM is passed on" in err


FAKE_LAUNCHER = """#!/bin/bash
trap 'touch stopped-by-{stop}; exit' {stop}
[[ "$1" != --version ]] || {{ echo Open MPI; exit; }}
echo "place ${{RANK-}}${{WORLD_SIZE-}}${{LOCAL_RANK-}}${{LOCAL_WORLD_SIZE-}} typed $(cat)."
for _ in {{1..1200}}; do sleep 0.1; done
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
@pytest.mark.parametrize(
    ("launcher", "program", "stop"),
    [("mpich", "mpiexec.hydra", "TERM"), ("openmpi", "mpirun", "USR2"), ("slurm", "srun", "USR2")],
)
def test_a_launcher_is_alone_with_its_ranks(
    launcher: str, program: str, stop: str, hostfile: str, tmp_path: Path
) -> None:
    """No place is left over from the shell, nothing typed there is read, and no run outlives deepy.py."""
    (tmp_path / program).write_text(FAKE_LAUNCHER.format(stop=stop))
    (tmp_path / program).chmod(0o755)
    (tmp_path / "probe.py").touch()
    model = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 32\n"
    (tmp_path / "tiny.yml").write_text(f"{model}launcher: {launcher}\n")
    (tmp_path / "typed").write_text("ls\n")
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with (tmp_path / "typed").open() as typed:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "deepy.py"), "probe.py", "tiny", "-H", hostfile],
            cwd=tmp_path, env={**os.environ, **own}, stdin=typed, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        line = next(line for line in process.stdout if line.startswith("place"))
        assert line == "place  typed .\n"
        process.kill()
        process.wait()
        until = time.monotonic() + 100
        while not (tmp_path / f"stopped-by-{stop}").exists():
            assert time.monotonic() < until, "it runs on"
            time.sleep(0.05)


def test_the_batch_script_tells_srun_of_its_cores(tmp_path: Path) -> None:
    """Slurm 22.05 and later do not hand them on."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$@"\n')
    srun.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6"}
    run = subprocess.run(
        ["bash", str(ROOT / "docs/slurm.sbatch"), "a.yml"], env=variables, capture_output=True, text=True
    )
    threads, *options = run.stdout.split()
    assert (threads, options[-2:]) == ("6", ["train.py", "a.yml"]), run.stderr
    assert {"--cpus-per-task=6", "--distribution=block", "--kill-on-bad-exit=1"} <= set(options)
