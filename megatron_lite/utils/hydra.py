"""Telling Hydra, which starts the ranks of MPICH and Intel MPI, that a rank has failed."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import termios
import time
from contextlib import suppress

READ_SECONDS = 10.0
"""How long Hydra may take to read what this rank has printed; it does so at once unless all is very slow."""


def end_other_ranks(status: int) -> None:
    """Let Hydra end all ranks of the run with exit status ``status``; nothing happens under other launchers.

    Other launchers do so by themselves when a rank ends with an exit status that is not 0. Hydra does when a
    signal ended it, else only when told: otherwise those that wait for this rank do so until their limit.
    Source: the command ``abort`` of the wire protocol of PMI-1, by which a rank talks to Hydra.
    """
    if "MPI_LOCALNRANKS" not in os.environ or "PMI_FD" not in os.environ:  # SLURM, too, may set the second
        return
    with suppress(OSError, ValueError):
        pipe = int(os.environ["PMI_FD"])
        if stat.S_ISSOCK(os.fstat(pipe).st_mode):  # in a process that a rank has started it is anything
            _wait_until_output_is_read()
            os.write(pipe, f"cmd=abort exitcode={status}\n".encode())


def _wait_until_output_is_read() -> None:
    """Hydra drops what still stands in the pipes of standard output and error when it is told to abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()
    until = time.monotonic() + READ_SECONDS
    while any(map(_unread, (1, 2))) and time.monotonic() < until:
        time.sleep(0.001)


def _unread(descriptor: int) -> int:
    """The bytes that stand in the pipe whose write end ``descriptor`` is, 0 for anything else."""
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return 0
        return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0])
    except OSError:
        return 0
