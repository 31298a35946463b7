"""A checkpoint's tensors, read without the code under test: JSON and the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def stored_index(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "index.json").read_text())


def stored_tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """By (name, kind), every tensor put together from its pieces."""
    index = stored_index(checkpoint)
    files = [load_file(checkpoint / entry["name"]) for entry in index["files"]]
    return {
        (name, kind): torch.cat(
            [files[n][f"{kind}/{name}[{a}:{b}]"] for n, a, b in sorted(entry["pieces"], key=lambda p: p[1])]
        ).view(entry["shape"])
        for name, parameter in index["parameters"].items()
        for kind, entry in parameter["tensors"].items()
    }


def stored_scalars(checkpoint: Path) -> dict[str, dict[str, float]]:
    return {name: entry["scalars"] for name, entry in stored_index(checkpoint)["parameters"].items()}
