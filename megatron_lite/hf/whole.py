"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lite.utils.errors import UserError
from megatron_lite.utils.files import fsync_directory


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that becomes ``out`` on success and disappears on any error.

    ``out`` may be a link to an empty folder: that is the one replaced.

    Raises:
        UserError: ``out`` has content, or cannot be replaced.
    """
    check_free(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        # safetensors makes files that only their owner may read; the folder's mode follows the umask.
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_dir():
                fsync_directory(path)
                continue
            path.chmod(mode)
            with open(path, "rb") as written:
                os.fsync(written.fileno())
        temporary.rename(out)
        fsync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: Path) -> None:
    """Raise :class:`UserError` if ``out`` is there and not an empty folder, which a rename can replace."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there: name a new folder, or empty it")
    place = out.resolve()
    if place == Path.cwd() or place.is_mount():
        kind = "a mount point" if place.is_mount() else "the current folder"
        raise UserError(f"{out} is {kind}, which cannot be replaced by a whole one: name a new folder in it")
