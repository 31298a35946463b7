"""Preprocessing runs that are killed at random moments, and given again until they end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.data.preprocessing.encode import EncodeSettings
from megatron_lite.data.preprocessing.run import preprocess

CONTEXT = multiprocessing.get_context("fork")


def outputs(prefix: Path) -> dict[str, bytes]:
    """The files of ``prefix``, by their endings."""
    found = sorted(prefix.parent.glob(f"{prefix.name}_*"))
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in found}


def run_quietly(inputs: Sequence[str], prefix: Path, settings: EncodeSettings, workers: int) -> None:
    """In a process of its own session, that one signal can end with its workers."""
    os.setsid()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    preprocess(inputs, prefix, settings, workers, on_error="skip")


def noted(prefix: Path) -> int:
    """Bytes of an unfinished run's journal, in which each task that is done has a line; 0 without a run."""
    try:
        return (prefix.with_name(f"{prefix.name}.partial") / "journal").stat().st_size
    except FileNotFoundError:
        return 0


def check_killed_runs(inputs: Sequence[str], folder: Path, settings: EncodeSettings, kills: int) -> int:
    """Kill runs ``kills`` times, each begun again until it ends: its files must be those of a run that was
    left alone. Returns how many of the killed runs had something to continue.

    When one is killed depends on what it has done, for its pace is that of a machine with other work: some as
    they start, some as they end; and some may end."""

    def start(prefix: Path, workers: int) -> multiprocessing.process.BaseProcess:
        process = CONTEXT.Process(target=run_quietly, args=(inputs, prefix, settings, workers))
        process.start()
        return process

    begin = time.monotonic()
    process, whole = start(folder / "whole", 2), 0
    while process.is_alive():
        whole = max(whole, noted(folder / "whole"))
        process.join(0.001)
    seconds = time.monotonic() - begin
    expected = outputs(folder / "whole")
    assert len(expected) == 3 * len(settings.keys)
    generator = random.Random(0)
    done = runs = continued = 0
    while done < kills:
        prefix = folder / f"killed{runs}"
        runs += 1
        finished = False
        while not finished:
            share = generator.uniform(-0.3, 1.3)
            goal = min(noted(prefix) + share * whole, whole)
            process = start(prefix, generator.choice([1, 2, 3]))
            if share > 1:
                process.join()
            while process.is_alive() and noted(prefix) < goal:
                process.join(0.001)
            process.join(generator.uniform(0, seconds / 10))  # then at any moment
            if process.is_alive():
                continued += prefix.with_name(f"{prefix.name}.partial").exists()
                with_workers = generator.random() < 0.5
                if with_workers and os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    os.kill(process.pid, signal.SIGKILL)  # its workers find out by themselves
                done += 1
            process.join()
            finished = process.exitcode == 0
            assert finished or process.exitcode == -signal.SIGKILL
        assert outputs(prefix) == expected
        assert not prefix.with_name(f"{prefix.name}.partial").exists()
    return continued
