"""Keys that do not agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.utils.errors import ConfigError

Keys = Mapping[str, Any]
"""Keys of a configuration, already of the right type."""


class Contradiction(ConfigError):
    """Keys that do not agree. ``keys`` are the ones to look at."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys
