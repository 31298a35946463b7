"""Start and stop of ``torch.distributed``: nccl on CUDA, gloo on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training import deepspeed_defects as defects

TIMEOUT = timedelta(minutes=30)
"""Longest wait in a collective: above any honest one (rank 0 tokenising data, a large checkpoint)."""


@contextmanager
def distributed(context: ParallelContext) -> Iterator[None]:
    """Within: this rank is in the run's process group (joined here, unless there is one already).

    Several ranks meet at MASTER_ADDR:MASTER_PORT. A single rank needs no port, so that two runs on one
    machine never collide.
    """
    defects.quiet_logs()
    defects.skip_shared_memory_build()
    defects.allow_fp16_on_cpu()
    joins = not dist.is_initialized()
    if joins:
        _join(context)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)
    yield
    if joins:
        dist.barrier()  # no rank closes its sockets while another still talks; after an error nobody waits
        dist.destroy_process_group()


def _join(context: ParallelContext) -> None:
    backend = "gloo"
    if context.device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(context.device)
    if context.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, init_method="env://", timeout=TIMEOUT)
