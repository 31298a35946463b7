"""What streams: loading, saving, resharding, merging and verifying hold a tensor at a time, not the model."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lite.checkpoint import load_checkpoint, read_weights, save_checkpoint
from megatron_lite.checkpoint.engine_state import COUNTERS
from megatron_lite.checkpoint.files import ElementReader
from megatron_lite.checkpoint.fragments import Fragment
from megatron_lite.checkpoint.index import Index
from megatron_lite.checkpoint.layouts.swapped import mapped
from megatron_lite.checkpoint.regions import Region
from megatron_lite.checkpoint.rewrite import Span, rewrite_checkpoint
from megatron_lite.checkpoint.snapshot import Snapshot, copied
from megatron_lite.checkpoint.verification import find_problems
from megatron_lite.parallel.context import ParallelContext, context_from_environment
from megatron_lite.parallel.parameter import ParameterFactory

COUNT, ROWS, COLUMNS = 32, 512, 1024
"""Tensors of a model, of 2 MiB each and with as much momentum: 128 MiB."""

LIMIT = 16 << 20
"""Bytes: an eighth of all, and several times a tensor."""

NAMES = [f"layers.{n}.weight" for n in range(COUNT)]
SHAPE = (ROWS, COLUMNS)


def expected(number: int) -> torch.Tensor:
    """A weight; every element of the model is another."""
    first = number * ROWS * COLUMNS
    return torch.arange(first, first + ROWS * COLUMNS, dtype=torch.float32).view(SHAPE)


def engine_of(first: float) -> Any:
    """As much of an engine as checkpoints see under ZeRO 0: its weights are ``first`` and follow."""
    factory = ParameterFactory(seed=1)
    parameters = [factory.make(name, SHAPE, lambda weight, generator: None) for name in NAMES]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(expected(number)).mul_(first)
        optimizer.state[parameter]["momentum_buffer"] = -parameter.data
    counters = dict.fromkeys(COUNTERS, 1)
    return SimpleNamespace(optimizer=optimizer, module=nn.ParameterList(parameters), **counters)


LIBC, MMAP_THRESHOLD = ctypes.CDLL(None), -3
"""The C library, and its ``M_MMAP_THRESHOLD``: from how many bytes on memory has pages of its own."""


def private_memory() -> int:
    """Bytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def growth(work: Callable[[], object]) -> int:
    """By how many bytes the process grows while ``work`` runs, at most."""
    gc.collect()
    # Each tensor gets pages of its own: memory that was freed before would be used again, and not be seen.
    LIBC.mallopt(MMAP_THRESHOLD, 1 << 20)
    before, peak, done = private_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()  # noqa: F841 (is still there when the memory is read)
        peak = max(peak, private_memory())
    finally:
        done.set()
        watcher.join()
        LIBC.mallopt(MMAP_THRESHOLD, 32 << 20)
    return peak - before


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return context_from_environment()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, context: ParallelContext) -> Path:
    """A checkpoint, written in bounded memory."""
    folder, engine = tmp_path_factory.mktemp("source"), engine_of(1.0)
    assert growth(lambda: save_checkpoint(folder, 1, engine, {}, {}, context)) < LIMIT
    return folder / "global_step1"


def test_the_measure_tells_all_at_once(source: Path) -> None:
    assert growth(lambda: dict(read_weights(source))) > COUNT * (2 << 20) * 0.9


def test_loading(source: Path, context: ParallelContext) -> None:
    engine = engine_of(0.0)
    assert growth(lambda: load_checkpoint(source, engine, context, load_rng=False)) < LIMIT
    for number, parameter in enumerate(engine.module):
        assert torch.equal(parameter, expected(number))
        assert torch.equal(engine.optimizer.state[parameter]["momentum_buffer"], -expected(number))


def test_merging_and_verifying(source: Path) -> None:
    def merge() -> None:
        for number, (name, weight) in enumerate(read_weights(source)):
            assert name == NAMES[number]
            assert torch.equal(weight, expected(number))

    assert growth(merge) < LIMIT
    assert growth(lambda: list(find_problems(ElementReader.of(source)))) < LIMIT


def test_resharding(source: Path, tmp_path: Path) -> None:
    halves = [Region(1, ((0, 600),)), Region(1, ((600, COLUMNS),))]
    shares = [[Span(name, half, 0, ROWS * half.length) for name in NAMES] for half in halves]
    assert growth(lambda: rewrite_checkpoint(source, tmp_path / "out", shares, {})) < LIMIT
    for number, (_, weight) in enumerate(read_weights(tmp_path / "out")):
        assert torch.equal(weight, expected(number))


def test_a_copy_of_what_is_on_disk_is_on_disk(tmp_path: Path) -> None:
    """A save beside the training of a run with NVMe offload: the state of the step, but not in memory."""
    numel = COUNT * ROWS * COLUMNS
    swap, kept = tmp_path / "weights.swp", torch.ones(5)
    swap.write_bytes(bytes(4 * numel))
    file = mapped(swap, numel, torch.float32)
    file.copy_(torch.arange(numel))
    places = [
        (file[:7], tmp_path),
        (kept, None),
        (file[7 : numel - 3], tmp_path),
        (file[:4].bfloat16(), tmp_path),
    ]
    fragments = [
        Fragment("x", "weight", (len(data),), None, 0, len(data), data, (0, len(data)), folder)
        for data, folder in places
    ]
    index = Index(1, 1, "Adam", {}, {}, {}, {}, {}, [], {})
    held: list[Snapshot] = []

    def copy() -> None:
        held.append(copied(Snapshot(index, fragments, "", {}), torch.device("cpu")))

    assert growth(copy) < LIMIT
    assert [path.name for path in tmp_path.iterdir()] == ["weights.swp"], "the copy has no name"
    file.zero_()
    kept.zero_()
    first, memory, most, half = (fragment.owned_data for fragment in held[0].fragments)
    assert first.tolist() == list(range(7))
    assert memory.tolist() == [1] * 5
    assert torch.equal(most, torch.arange(7, numel - 3, dtype=torch.float32))
    assert half.tolist() == [0, 1, 2, 3]
