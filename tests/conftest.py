"""How the tests run: side by side, each on one core; hypothesis without deadlines (machines are shared)."""

import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from megatron_lite.utils.log import LOGGER

TOOLS = Path(__file__).resolve().parents[1] / "tools"

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be what tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("megatron_lite", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megatron_lite")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Give every test the same environment: RANK and its kin, set in one, would reach the next's ranks."""
    environment = dict(os.environ)
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call ``run_tool("generate", *words)``: the tool's main in this process, as typed; its exit status."""
    for name in ("handlers", "propagate", "level"):  # which the tools set
        value = getattr(LOGGER, name)
        monkeypatch.setattr(LOGGER, name, list(value) if name == "handlers" else value)

    def call(tool: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, words)])
        return runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]()

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long: the last one leaves the other cores idle until it ends."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
