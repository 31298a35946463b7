"""``metrics.jsonl``: one JSON object a line, kept by every run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_lite.config import Config
from megatron_lite.utils.errors import DataError

FILE_NAME = "metrics.jsonl"


class JsonLines:
    """Appends ``{"step": ..., "time": ..., name: value, ...}`` lines.

    ``time`` is in seconds since 1970. NaN and infinities, which JSON does not have, become ``null``. Each
    line reaches the operating system at once, so that a killed run loses none. A resumed run appends: where a
    step occurs twice, the later line counts.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
        _drop_unfinished_line(path)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the figures of ``step``."""
        line = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_unfinished_line(path: Path) -> None:
    """Cut what follows the last newline: a line whose writer was killed."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def open_jsonl(config: Config, run_dir: Path) -> JsonLines:
    """The run's ``metrics.jsonl``, whatever the configuration."""
    return JsonLines(run_dir / FILE_NAME)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` in order; an unfinished last line is left out.

    Raises:
        DataError: a line is not a JSON object with a ``step``.
    """
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            try:
                line = orjson.loads(text)
                line["step"] + 0
            except (orjson.JSONDecodeError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}, line {number} is not a line of metrics: give a metrics.jsonl"
                ) from error
            yield line
