"""Telling Hydra, which starts the ranks of MPICH and Intel MPI, that a rank has failed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


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
            os.write(pipe, f"cmd=abort exitcode={status}\n".encode())
