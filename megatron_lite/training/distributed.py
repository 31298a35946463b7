"""Start and stop of ``torch.distributed``: nccl on CUDA, gloo on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training import deepspeed_defects as defects
from megatron_lite.training.interface import choose_interface
from megatron_lite.training.watchdog import LONGER_SECONDS, longest_silence
from megatron_lite.utils.errors import ConfigError, LostRankError

MARGIN_SECONDS = 600.0
"""How much longer a collective may wait than the watchdog, which shows the stacks of all ranks, lets it."""

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)
"""How gloo, nccl and torch's store say that the process on the other side is no more."""


@contextmanager
def distributed(context: ParallelContext, timeout: float = LONGER_SECONDS) -> Iterator[None]:
    """Within: this rank is in the run's process group (joined here, unless there is one already).

    Several ranks meet at MASTER_ADDR:MASTER_PORT. A single rank needs no port, so that two runs on one
    machine never collide. ``timeout`` is the key ``distributed_timeout``, in seconds: the collectives of all
    groups, also of those made later, wait longer than the watchdog that it sets.

    Raises:
        ConfigError: something else listens at MASTER_PORT of rank 0's host.
        LostRankError: another rank has ended; it, or the launcher, tells why.
    """
    defects.quiet_logs()
    defects.skip_shared_memory_build()
    defects.allow_fp16_on_cpu()
    limit = timedelta(seconds=longest_silence(timeout) + MARGIN_SECONDS)
    # Groups made without a limit of their own, as DeepSpeed's are, take these: 10 minutes for nccl otherwise.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    joins = not dist.is_initialized()
    try:
        if joins:
            _join(context, limit)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=limit)
        yield
        if joins:
            dist.barrier()  # no rank closes its sockets while another still talks; after an error none waits
            dist.destroy_process_group()
    except RuntimeError as error:
        reasons = [words for words in LOST if words in str(error)]
        if context.world_size > 1 and reasons:
            raise LostRankError(f"another rank has ended; the connection to it: {reasons[0]}") from error
        raise


def _join(context: ParallelContext, limit: timedelta) -> None:
    backend = "gloo"
    if context.device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(context.device)
    if context.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        choose_interface(os.environ["MASTER_ADDR"])
        try:
            dist.init_process_group(backend, init_method="env://", timeout=limit)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(
                f"port {os.environ['MASTER_PORT']} is taken, maybe by another run on this host: choose "
                "another one (the key master_port under deepy.py, else the variable MASTER_PORT of all ranks)"
            ) from error
