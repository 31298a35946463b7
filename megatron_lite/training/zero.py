"""What keys of ZeRO ask of the machine: NVMe offload an operator and a folder, quantised traffic a GPU."""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.together import together
from megatron_lite.config import Config
from megatron_lite.config.sections.zero import OFFLOADS
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner import estimate_memory
from megatron_lite.planner.swap import swap_keys
from megatron_lite.training import deepspeed_defects as defects
from megatron_lite.utils.errors import ConfigError
from megatron_lite.utils.log import LOGGER


def zero_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` block, with a run's own swap folders and buffers of fitting sizes."""
    own = swap_keys(config)
    given = config.zero.block.items()
    block = {
        key: value for key, value in given if f"stage3_{key}" not in own
    } | own  # no key by both its names
    for name in OFFLOADS:
        if (block.get(name) or {}).get("device") == "nvme":
            block[name] = {**block[name], "nvme_path": str(swap_folder(config, block[name]["nvme_path"]))}
    return block


def swap_folder(config: Config, nvme_path: str) -> Path:
    """The run's own folder in ``nvme_path``. The run that goes on in the same ``run_dir`` has the same."""
    number = zlib.crc32(os.fsencode(Path(config.run_dir).absolute()))
    return Path(nvme_path) / f"megatron_lite-{number:08x}"


def check_zero(config: Config, device: torch.device) -> None:
    """Raise ConfigError for what of ZeRO++ cannot be had with ``config`` on ``device``.

    Its quantisation kernels are CUDA's. The groups of its hierarchical partitioning are DeepSpeed's own:
    consecutive ranks of the whole run, whatever else neighbours do.
    """
    zero = config.zero.zero_optimization
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if device.type == "cpu" and getattr(zero, key):
            raise ConfigError(
                f"zero_optimization.{key} runs on a GPU only, and this run is on a CPU: leave it out"
            )
    size, parallel = zero.zero_hpz_partition_size or 1, config.parallel
    if size > 1 and parallel.model_parallel_size > 1:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size {size} does not go with model_parallel_size "
            f"{parallel.model_parallel_size}, whose ranks are neighbours, too: leave one out"
        )
    if parallel.world_size % size:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size {size} does not divide the {parallel.world_size} "
            "ranks: choose the number of ranks of a machine"
        )


@contextmanager
def swap_space(config: Config, context: ParallelContext) -> Iterator[None]:
    """Within: empty folders for what is offloaded to NVMe, and the operator that reads and writes them.

    What a killed run left is removed first; what this one wrote, at the end. Every rank calls this, with
    ``torch.distributed`` running; does nothing without NVMe offload.

    Raises:
        UserError: a folder cannot be used, its disk is too small, or the operator cannot be compiled.
    """
    blocks = [config.zero.block.get(name) or {} for name in OFFLOADS]
    paths = {block["nvme_path"] for block in blocks if block.get("device") == "nvme"}
    folders = [swap_folder(config, path) for path in sorted(paths)]
    if not folders:
        yield
        return

    def prepare() -> None:
        if context.local_rank == 0:
            for folder in folders:
                _make_empty(folder)
            _check_space(folders[0], config, int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size)))
        load_async_io(announce=context.local_rank == 0)

    together(context, prepare)
    defects.copy_out_of_swap_buffers()
    try:
        yield
    finally:
        if context.local_rank == 0:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    """Make ``folder``, empty, where files can be read and written around the kernel's cache."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        probe = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        raise ConfigError(
            f"zero_optimization: nvme_path {folder.parent} cannot be used ({error.strerror}): it must be a "
            "folder on a local disk, which can be written to and supports O_DIRECT"
        ) from error
    os.close(probe)
    (folder / "probe").unlink()


def _check_space(folder: Path, config: Config, ranks: int) -> None:
    """Raise ConfigError when the swap files of ``ranks`` ranks will not fit on the disk."""
    needed = ranks * estimate_memory(config).disk_total
    free = shutil.disk_usage(folder).free
    if needed > free:
        folder.rmdir()
        raise ConfigError(
            f"zero_optimization: nvme_path {folder.parent} has {free / 1e9:.1f} GB free, and {ranks} rank(s) "
            f"swap {needed / 1e9:.1f} GB: choose a larger disk, or offload less"
        )


def load_async_io(announce: bool = True) -> None:
    """Load DeepSpeed's ``async_io``; the first time on a machine it is compiled, which takes minutes.

    Raises ConfigError when libaio, ninja or the compiler is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if shutil.which("ninja") is None:  # the package puts it beside this Python, which need not be on the path
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [f"the program {tool}" for tool in ("ninja", "g++") if shutil.which(tool) is None]
    builder = AsyncIOBuilder()
    if not missing and not builder.is_compatible():
        missing = ["libaio with its header (Debian and Ubuntu: apt install libaio-dev)"]
    if missing:
        raise ConfigError(
            "offloading to NVMe compiles DeepSpeed's async_io, and this machine lacks "
            f"{' and '.join(missing)}: install it, or offload to cpu"
        )
    if announce and not async_io_is_built():
        LOGGER.info("compiling DeepSpeed's async_io, once on this machine: about 3 minutes")
    builder.load(verbose=False)


def async_io_is_built() -> bool:
    """Whether DeepSpeed's ``async_io`` has been compiled on this machine."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return any(Path(root).glob("**/async_io/async_io.so"))
