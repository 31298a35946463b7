"""Whether all ranks see one and the same folder."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from megatron_lite.checkpoint.signs import Sign, unheard
from megatron_lite.checkpoint.together import on_first_rank, together
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.utils.errors import CheckpointError

PATIENCE = 60.0
"""Seconds until every host must see what another one made: NFS may remember so long that it is not there."""


def check_shared(folder: Path, context: ParallelContext, sign: Sign = unheard) -> None:
    """Make ``folder``, and see that every rank finds in it what rank 0 writes; every rank calls this.

    Raises:
        CheckpointError: on every rank alike: it cannot be written to, or a host has another folder there.
    """
    name = context.broadcast_object(f".probe-{uuid.uuid4().hex}")
    probe = folder / str(name)

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()

    def see() -> None:
        deadline = time.monotonic() + PATIENCE
        while not probe.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"save: {folder} on the host {os.uname().nodename} is not the folder of that name on "
                    "rank 0's host: choose one on a file system that all hosts share"
                )
            time.sleep(0.1)

    on_first_rank(context, make, sign=sign)
    try:
        together(context, see, sign=sign)
    finally:
        if context.is_first:
            probe.unlink(missing_ok=True)
