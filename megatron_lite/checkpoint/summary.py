"""What is inside a checkpoint, for programs (JSON) and for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.index import VERSION, WEIGHT, Index, ParameterEntry, TensorEntry

KEYS_OF_THE_LAYOUT = {
    "tensor": "model_parallel_size",
    "pipe": "pipe_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_parallel_size",
}


def describe(checkpoint: Path, index: Index) -> dict[str, Any]:
    """The index in a form that can be shown, JSON-able: without pieces, with the sums that people ask for."""
    weights = [entry.tensors[WEIGHT] for entry in index.parameters.values()]
    return {
        "checkpoint": str(checkpoint),
        "format_version": VERSION,
        "step": index.step,
        "trainer_state": index.trainer_state,
        "versions": index.versions,
        "layout": _layout(index),
        "optimizer": {
            "type": index.optimizer,
            "tensors": sorted({kind for p in index.parameters.values() for kind in p.tensors} - {WEIGHT}),
            "numbers": sorted({kind for p in index.parameters.values() for kind in p.scalars}),
        },
        "loss_scaler": index.loss_scaler,
        "elements": sum(math.prod(weight.shape) for weight in weights),
        "bytes": sum(entry.bytes for entry in index.files),
        "files": [{"name": e.name, "bytes": e.bytes, "xxh3": e.xxh3} for e in index.files],
        "parameters": {
            name: _parameter(index.parameters[name]) for name in sorted(index.parameters, key=_natural)
        },
        "config": index.config,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def _layout(index: Index) -> dict[str, Any]:
    """The degrees of the run that wrote it, as its configuration has them."""
    degrees = {name: max(index.config.get(key) or 1, 1) for name, key in KEYS_OF_THE_LAYOUT.items()}
    shared = degrees["tensor"] * degrees["pipe"] * degrees["context"]
    return {
        "ranks": index.world_size,
        "data": max(index.world_size // shared, 1),
        **degrees,
        "zero": (index.config.get("zero_optimization") or {}).get("stage", 0),
        "precision": index.config.get("precision", "fp32"),
    }


def _parameter(entry: ParameterEntry) -> dict[str, Any]:
    return {
        "shape": list(entry.shape),
        **_tensor(entry.tensors[WEIGHT]),
        "state": {
            kind: {"shape": list(tensor.shape), **_tensor(tensor)}
            for kind, tensor in entry.tensors.items()
            if kind != WEIGHT
        },
        "numbers": entry.scalars,
    }


def _tensor(entry: TensorEntry) -> dict[str, Any]:
    """Its dtype, into how many parts of which dimension it is divided, and how many pieces it is in."""
    regions = {piece.region for piece in entry.pieces if piece.region is not None}
    divided = next(iter(regions)).dim if regions else None
    return {
        "dtype": entry.dtype,
        "shards": len(regions) or 1,
        "divided_dimension": divided,
        "pieces": len(entry.pieces),
    }


def as_text(facts: dict[str, Any]) -> str:
    """What :func:`describe` tells, as lines for people: facts, files, a table of the parameters."""
    layout, optimizer = facts["layout"], facts["optimizer"]
    degrees = ", ".join(
        f"{name} {layout[name]}" for name in ("data", *KEYS_OF_THE_LAYOUT) if layout[name] > 1
    )
    state = ", ".join([*optimizer["tensors"], *optimizer["numbers"]])
    lines = [
        ("checkpoint", facts["checkpoint"]),
        ("step", f"{facts['step']:,}"),
        ("trainer", _numbers(facts["trainer_state"])),
        ("written by", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ("layout", f"{layout['ranks']} ranks ({degrees or 'one of each kind'}), ZeRO {layout['zero']}, "
                   f"{layout['precision']}"),
        ("optimizer", f"{optimizer['type']}: {state or 'no state'}"),
        ("loss scale", _numbers(facts["loss_scaler"])),
        ("weights", f"{facts['elements']:,} elements of {len(facts['parameters'])} parameters"),
        ("size", f"{_size(facts['bytes'])} in {len(facts['files'])} files, format {facts['format_version']}"),
    ]  # fmt: skip
    head = [f"{name:<12}{text}" for name, text in lines if text]
    files = _table(
        ["file", "size", "XXH3"], ((f["name"], _size(f["bytes"]), f["xxh3"]) for f in facts["files"])
    )
    rows = (_row(name, parameter) for name, parameter in facts["parameters"].items())
    parameters = _table(["parameter", "shape", "dtype", "shards", "pieces", "state"], rows)
    return "\n".join([*head, "", *files, "", *parameters])


def _numbers(values: dict[str, Any]) -> str:
    """Those of ``values`` that are numbers."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:,}" for name, value in numbers.items())


def _row(name: str, parameter: dict[str, Any]) -> tuple[str, ...]:
    shards = str(parameter["shards"])
    if parameter["divided_dimension"] is not None:
        shards += f" of dim {parameter['divided_dimension']}"
    kinds = [
        kind if tensor["shape"] == parameter["shape"] else f"{kind} {_shape(tensor['shape'])}"
        for kind, tensor in parameter["state"].items()
    ]
    shape = _shape(parameter["shape"])
    return name, shape, parameter["dtype"], shards, str(parameter["pieces"]), ", ".join(kinds)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "number"


def _size(count: int) -> str:
    """Bytes for people, in powers of two."""
    number, units = float(count), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while number >= 1024 and (larger := next(units, None)):
        number, unit = number / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{number:.1f} {unit}"


def _table(names: list[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of columns, each as wide as its widest cell."""
    cells = [tuple(names), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
