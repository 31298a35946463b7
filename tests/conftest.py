"""How the tests run: side by side, each on one core; hypothesis without deadlines (machines are shared)."""

import os
import signal
from collections import Counter
from collections.abc import Generator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long: the last one leaves the other cores idle until it ends."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
