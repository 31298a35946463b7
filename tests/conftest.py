"""How the tests run: side by side, each on one core; hypothesis without deadlines (machines are shared)."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("megatron_lite", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megatron_lite")
