"""How hypothesis runs here: no deadlines (machines are shared), and the same examples every time in CI."""

import os

from hypothesis import settings

settings.register_profile("megatron_lite", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megatron_lite")
