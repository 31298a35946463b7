"""The shape of the house: imports go down the floors, no cycles, few places know DeepSpeed, short files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_lite"
FLOORS = {
    "utils": 0,
    "config": 1,
    "planner": 2,
    "parallel": 2,
    "data": 2,
    "model": 3,
    "launcher": 3,
    "checkpoint": 4,
    "hf": 5,
    "metrics": 5,
    "generation": 5,
    "evaluation": 6,
    "foreign": 6,
    "training": 6,
}
"""A package imports itself and packages of lower numbers."""

MAY_IMPORT_DEEPSPEED = {"launcher", "checkpoint", "training"}
FREE_OF_TORCH = ["megatron_lite.config", "megatron_lite.planner", "megatron_lite.launcher"]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """The modules ``path`` imports; ``from a import b`` gives ``a.b`` where that is a module, else ``a``."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own = module_name(path).split(".")[1:2]
    if not own:
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "megatron_lite" and len(parts) > 1 and parts[1] != own[0]:
            assert FLOORS[parts[1]] < FLOORS[own[0]], f"{path}: {own[0]} may not import {parts[1]}"
        if parts[0] == "deepspeed":
            assert own[0] in MAY_IMPORT_DEEPSPEED, f"{path}: {own[0]} may not import deepspeed"


def test_every_package_has_a_floor() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(FLOORS)


def test_no_import_cycle() -> None:
    names = {module_name(path) for path in modules()}
    graph = {
        module_name(path): {name for name in imports(path, top_level_only=True) if name in names}
        for path in modules()
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", FREE_OF_TORCH)
def test_import_is_free_of_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0


@pytest.mark.parametrize("path", [*modules(), *sorted((ROOT / "tools").glob("*.py"))], ids=str)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400
