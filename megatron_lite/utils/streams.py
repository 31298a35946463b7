"""Standard output that outlives its reader: a run whose terminal or pipe is gone still has to save."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)
"""What a write says when the reader of a pipe has ended, or a terminal was closed."""


class _LastingFile(io.FileIO):
    """A file descriptor; what nobody can read any more is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on, neither ``print`` nor the log fails when standard output or error has lost its reader.

    Ctrl-C ends ``tee`` together with the run that writes to it, and a closed terminal leaves a run that has
    been asked to save. Each line is written when it is complete.
    """
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO) -> TextIO:
    stream.flush()
    binary = io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(binary, stream.encoding, stream.errors, line_buffering=True)
