"""What DeepSpeed keeps in files on NVMe between two steps, as tensors that are those files.

DeepSpeed's swapper writes a tensor's bytes as they are, padded, to a file of its own. Mapped into memory such
a file is a tensor of the layout like any other: saving reads it, loading writes it, neither needs memory for
what is swapped out (the pages belong to the file, and the kernel drops them when it wants to).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.layouts.layout import Holder, Part

ALIGNMENT = 8
"""Bytes: an element of any dtype begins at a multiple of its size."""


def mapped(path: str | Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The first ``numel`` elements of the file ``path``: reading and writing the tensor is doing so to it."""
    with open(path, "r+b") as file:
        pages = mmap.mmap(file.fileno(), numel * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype, count=numel)  # keeps the mapping alive


def copies_on_disk(tensors: Sequence[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    """Copies of ``tensors`` (1-D, on the CPU) in one file in ``folder``, mapped into memory as they are.

    The file has no name, and is gone with the last of the copies, or with the process. Costs the disk their
    size, and no memory but the kernel's cache. Raises OSError when the disk is full.
    """
    starts = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            starts.append(file.tell())
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        pages = mmap.mmap(file.fileno(), file.tell())
    return [
        torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        for tensor, start in zip(tensors, starts, strict=True)
    ]


@dataclass(frozen=True)
class SwappedHolder(Holder):
    """A sub-group whose fp32 weights and optimizer state are on NVMe; ``tensor`` is the weights' file.

    Attributes:
        wrapper: DeepSpeed's ``DeepSpeedZeroOptimizer_Stage3``.
        sub_group: its number there.
    """

    wrapper: Any = None
    sub_group: int = 0

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state: what is swapped out as its file, the rest (numbers) as it is."""
        files = self._files()
        return {
            kind: mapped(files[id(value)], self.tensor.numel(), self.tensor.dtype)
            if id(value) in files
            else value
            for kind, value in self._kept().items()
        }

    def set_number(self, kind: str, value: int | float) -> None:
        """Set a Python number of the optimizer's state."""
        self._kept()[kind] = value

    @contextmanager
    def in_memory(self) -> Iterator[torch.Tensor]:
        """Within: weights and state are in the swapper's buffers; yields the optimizer's tensor. Then out."""
        self.wrapper._optimizer_states_and_gradient_swap_in(self.sub_group)
        yield self._parameter
        self.wrapper._optimizer_states_and_gradient_swap_out(self.sub_group)

    def refresh_parameters(self) -> None:
        """Make the model's parameters from the weights' file."""
        for path in self._files().values():
            _write_to_disk(path)  # DeepSpeed reads around the kernel's cache
        self.wrapper._optimizer_states_and_gradient_swap_in(self.sub_group)
        self.wrapper._reassign_or_swap_out_partitioned_parameters(self.sub_group)
        self.wrapper._release_swap_buffers(self.sub_group)

    @property
    def _parameter(self) -> torch.Tensor:
        return self.wrapper.fp32_partitioned_groups_flat[self.sub_group]

    def _kept(self) -> dict[str, Any]:
        """What the optimizer has of this sub-group; tensors that are swapped out are empty there."""
        return self.wrapper.optimizer.state.get(self._parameter, {})

    def _files(self) -> dict[int, str]:
        """Paths by the identity of the tensor that is swapped to it."""
        return {
            id(each.compute_tensor): each.swap_path for each in _info(self.wrapper, self.sub_group).tensors
        }


def swapped_holder(wrapper: Any, sub_group: int, parts: tuple[Part, ...]) -> SwappedHolder:
    """The holder of a sub-group that is on NVMe, with ``parts`` in it."""
    info = _info(wrapper, sub_group)
    weights = mapped(info.get_swap_paths()[0], info.numel(), info.dtype())
    group = wrapper.sub_group_to_group_id[sub_group]
    folder = Path(info.get_swap_paths()[0]).parent
    return SwappedHolder(
        weights, parts, False, wrapper.optimizer, group, None, folder, wrapper=wrapper, sub_group=sub_group
    )


def parameter_slice(parameter: Any) -> tuple[torch.Tensor, Path | None]:
    """This rank's slice of a parameter under ZeRO 3, and the folder of its file if it is on NVMe."""
    slice_ = parameter.ds_tensor
    if slice_.status.name == "AVAILABLE":
        return slice_.data, None
    path = Path(parameter.nvme_swapper.get_path(parameter, must_exist=True))
    return mapped(path, slice_.ds_numel, parameter.dtype), path.parent


def _info(wrapper: Any, sub_group: int) -> Any:
    """The swapper's account of a sub-group."""
    return wrapper.optimizer_swapper.swap_params_info[wrapper.fp32_partitioned_groups_flat[sub_group].ds_id]


def _write_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
