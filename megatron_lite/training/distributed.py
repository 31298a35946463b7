"""Start and stop of ``torch.distributed``: nccl on CUDA, gloo on a CPU."""

from __future__ import annotations

from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training import deepspeed_defects as defects

TIMEOUT = timedelta(minutes=30)
"""Longest wait in a collective: above any honest one (rank 0 tokenising data, a large checkpoint)."""


def start_distributed(context: ParallelContext) -> None:
    """Join the run's process group; nothing happens when there is one already (tests).

    Several ranks meet at MASTER_ADDR:MASTER_PORT. A single rank needs no port, so that two runs on one
    machine never collide.
    """
    defects.quiet_logs()
    defects.skip_shared_memory_build()
    defects.allow_fp16_on_cpu()
    if not dist.is_initialized():
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        if context.device.type == "cuda":
            torch.cuda.set_device(context.device)
        if context.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, init_method="env://", timeout=TIMEOUT)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)


def stop_distributed() -> None:
    """Leave the process group, so that no rank's sockets close while another still talks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
