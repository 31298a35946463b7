"""What streams: loading, saving, resharding, merging and verifying hold a tensor at a time, not the model."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ranks import run_ranks
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
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.parallel.parameter import ParameterFactory

COUNT, ROWS, COLUMNS = 32, 512, 1024
"""Tensors of a model, of 2 MiB each and with as much momentum: 128 MiB."""

TENSOR, REST = 4 * ROWS * COLUMNS, 1 << 20
"""Bytes of a tensor; and of what may be there beside it: the index, the headers of the files, values that are
looked at (256 KiB and a few numbers of each), what is smaller than ``LARGE``. Before any tensor is read, a
checksum has two blocks of 1 MiB of a file."""

LARGE = 1 << 17
"""Bytes from which on memory has pages of its own, and gives them back: other memory keeps gaps."""

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
    LIBC.malloc_trim(0)  # what was freed before would be used again, and not be seen
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
    return peak - before


def measure(folder: Path) -> dict[str, int]:
    """What each operation takes. In a process of its own: memory that others freed has gaps."""
    LIBC.mallopt(MMAP_THRESHOLD, LARGE)
    context, engine, source = context_from_environment(), engine_of(1.0), folder / "global_step1"
    saving = growth(lambda: save_checkpoint(folder, 1, engine, {}, {}, context))
    all_at_once = growth(lambda: dict(read_weights(source)))
    engine = engine_of(0.0)
    loading = growth(lambda: load_checkpoint(source, engine, context))
    for number, parameter in enumerate(engine.module):
        assert torch.equal(parameter, expected(number))
        assert torch.equal(engine.optimizer.state[parameter]["momentum_buffer"], -expected(number))
    halves = [Region(1, ((0, 600),)), Region(1, ((600, COLUMNS),))]
    shares = [[Span(name, half, 0, ROWS * half.length) for name in NAMES] for half in halves]
    return {
        "all at once": all_at_once,
        "saving": saving,
        "loading": loading,
        "resharding": growth(lambda: rewrite_checkpoint(source, folder / "out", shares, {})),
        "merging": growth(lambda: merge(folder / "out")),
        "verifying": growth(lambda: list(find_problems(ElementReader.of(source)))),
        "copying what is on disk": growth_of_a_copy(folder / "swap"),
    }


def merge(checkpoint: Path) -> None:
    for number, (name, weight) in enumerate(read_weights(checkpoint)):
        assert name == NAMES[number]
        assert torch.equal(weight, expected(number))


def growth_of_a_copy(folder: Path) -> int:
    """A save beside the training of a run with NVMe offload: the state of the step, but not in memory."""
    numel = COUNT * ROWS * COLUMNS
    swap, kept = folder / "weights.swp", torch.ones(5)
    folder.mkdir()
    swap.write_bytes(bytes(4 * numel))
    file = mapped(swap, numel, torch.float32)
    file.copy_(torch.arange(numel))
    places = [(file[:7], folder), (kept, None), (file[7 : numel - 3], folder), (file[:4].bfloat16(), folder)]
    fragments = [
        Fragment("x", "weight", (len(data),), None, 0, len(data), data, (0, len(data)), place)
        for data, place in places
    ]
    index = Index(1, 1, "Adam", {}, {}, {}, {}, {}, [], {})
    held: list[Snapshot] = []
    grown = growth(lambda: held.append(copied(Snapshot(index, fragments, "", {}), torch.device("cpu"))))
    assert [path.name for path in folder.iterdir()] == ["weights.swp"], "the copy has no name"
    file.zero_()
    kept.zero_()
    first, memory, most, half = (fragment.owned_data for fragment in held[0].fragments)
    assert first.tolist() == list(range(7))
    assert memory.tolist() == [1] * 5
    assert torch.equal(most, torch.arange(7, numel - 3, dtype=torch.float32))
    assert half.tolist() == [0, 1, 2, 3]
    return grown


def test_a_tensor_at_a_time(tmp_path: Path) -> None:
    (grown,) = run_ranks(measure, 1, tmp_path)
    assert grown.pop("all at once") > 0.9 * COUNT * TENSOR, "the measure sees what is held"
    tensors = {"merging": 2}  # the caller has one still while the next is made
    excess = {what: size for what, size in grown.items() if size > tensors.get(what, 1) * TENSOR + REST}
    assert excess == {}
