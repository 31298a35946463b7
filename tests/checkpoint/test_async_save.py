"""Saving beside the training: the same bytes, nothing published before its time, failures told by all."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from small_run import CONFIG_KEYS, Run, make_engine, save, start, train

from megatron_lite.checkpoint import background, find_checkpoint, verify
from megatron_lite.checkpoint import save as saving
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.save import write_checkpoint
from megatron_lite.utils.errors import CheckpointError

RUNS = [Run(0), Run(1, precision="bf16", dropout=0.1), Run(3)]
RUN = RUNS[0]


class Gate:
    """Holds the writing back until it is opened, so that nothing depends on who is faster."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.open = self._opened.set
        background.write_checkpoint = self._write  # type: ignore[attr-defined]

    def _write(self, *arguments: Any) -> Path:
        self._opened.wait()
        return write_checkpoint(*arguments)


def begin(saver: BackgroundSaver, folder: Path, engine: Any, step: int) -> Path | None:
    return saver.start(folder, step, engine, {"step": step}, CONFIG_KEYS)


def train_on_while_saving(folder: Path) -> list[Any]:
    """Of each run: what was seen while its save was held back, what it and the next save came to."""
    context = start()
    seen = []
    for run in RUNS:
        engine, place = make_engine(run), folder / f"beside-{run}"
        gate, saver = Gate(), BackgroundSaver(context)
        train(engine, 0, 2)
        save(run, engine, context, folder, 2)
        early = [saver.poll()]
        begin(saver, place, engine, 2)
        for step in range(2, 4):
            train(engine, step, step + 1)
            early.append(saver.poll())
        early.extend(path.name for path in place.glob("*"))
        save(run, engine, context, folder, 4)
        context.barrier()
        gate.open()
        first = begin(saver, place, engine, 4)
        last = saver.wait()
        saver.close()
        seen.append((early, first and first.name, last and last.name, saver.poll()))
    return seen


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_the_bytes_are_those_of_a_save_at_that_step(tmp_path: Path) -> None:
    outcomes = run_ranks(train_on_while_saving, 2, tmp_path)
    expected = ([None, None, None], "global_step2", "global_step4", None)
    assert outcomes == [[expected] * len(RUNS)] * 2
    for run in RUNS:
        there, beside = tmp_path / str(run), tmp_path / f"beside-{run}"
        assert find_checkpoint(beside).name == "global_step4"
        for step in ("global_step2", "global_step4"):
            assert contents(there / step) == contents(beside / step)
        assert sorted(path.name for path in beside.iterdir()) == ["global_step2", "global_step4", "latest"]


def train_until_told(engine: Any, saver: BackgroundSaver) -> None:
    while saver.poll() is None:
        train(engine, 1, 2)


def fill_the_disk_of_rank_1(folder: Path) -> tuple[str, list[str]]:
    """The sentence in which the step loop ends, and what is in the folder then."""
    context = start()
    engine, place = make_engine(RUN), folder / str(RUN)
    saver = BackgroundSaver(context)
    train(engine, 0, 1)
    save(RUN, engine, context, folder, 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
    begin(saver, place, engine, 2)
    with pytest.raises(CheckpointError) as caught:
        train_until_told(engine, saver)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    context.barrier()
    names = [*sorted(path.name for path in place.iterdir()), (place / "latest").read_text()]
    context.barrier()
    begin(saver, place, engine, 3)  # there is room again
    assert saver.wait() == place / "global_step3"
    saver.close()
    return str(caught.value), names


def test_a_full_disk_ends_every_rank_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_ranks(fill_the_disk_of_rank_1, 2, tmp_path)
    assert first == second
    sentence, names = first
    assert sentence.endswith("optimizer_00001.safetensors cannot be written: File too large (rank 1)")
    assert names == ["global_step1", "latest", "global_step1\n"]
    verify(tmp_path / str(RUN))


def die_while_writing(folder: Path) -> None:
    """Rank 0, which would tidy up, is killed (SIGKILL) by its own writing thread, between its two files."""
    context = start()
    engine, saver = make_engine(RUN), BackgroundSaver(context)
    train(engine, 0, 1)
    save(RUN, engine, context, folder, 1)
    write_file = saving.write_file

    def write_one(*arguments: Any) -> Any:
        if context.is_first and "optimizer" in arguments[0].name:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_file(*arguments)

    saving.write_file = write_one  # type: ignore[attr-defined]
    begin(saver, folder / str(RUN), engine, 2)
    saver.wait()


def save_once(folder: Path) -> None:
    context = start()
    save(RUN, make_engine(RUN), context, folder, 3)


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without a traceback"):
        run_ranks(die_while_writing, 2, tmp_path)
    place = tmp_path / str(RUN)
    assert find_checkpoint(place).name == "global_step1"
    verify(place)
    assert (place / ".tmp-global_step2" / "weights_00000.safetensors").exists(), "it was under way"
    run_ranks(save_once, 1, tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["global_step1", "global_step3", "latest"]
