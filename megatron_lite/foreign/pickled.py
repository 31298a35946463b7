"""Files of torch.save that hold more than tensors, without running anything that is in them.

Trainers save random generators, arguments and the like beside the weights, whose classes
``torch.load(weights_only=True)`` refuses. Here an empty placeholder stands for each, so that neither they nor
their modules are ever touched.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from megatron_lite.utils.errors import CheckpointError

EXPECTED = frozenset({"argparse", "collections", "deepspeed", "megatron", "numpy", "pathlib", "torch"})
"""Modules whose classes trainers save beside weights. Any other name is a file that nobody should open."""


class Placeholder:
    """Stands for an object that nobody needs; takes whatever the file says about it and keeps nothing."""

    def __new__(cls, *_: Any) -> Placeholder:
        """The object, whatever it was to be made of."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load_pickled(file: Path) -> Any:
    """The content of ``file``, its tensors mapped into memory (CPU), other objects :class:`Placeholder`.

    Raises:
        CheckpointError: it is damaged, or names what no trainer saves beside weights.
    """
    try:
        with _nothing_declared_safe():
            return _load(file)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is damaged, or no file of weights ({reason}): copy it anew") from None


def _load(file: Path) -> Any:
    is_zip = zipfile.is_zipfile(file)
    names = get_unsafe_globals_in_checkpoint(str(file)) if is_zip else []
    strange = sorted(name for name in names if name.split(".")[0] not in EXPECTED)
    if strange:
        raise CheckpointError(
            f"{file} asks for {strange[0]} to be run, which no trainer saves beside weights: nothing was "
            "run; do not open it with anything else"
        )
    with safe_globals([(Placeholder, name) for name in names]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


@contextmanager
def _nothing_declared_safe() -> Iterator[None]:
    """Take back, for a while, the classes that libraries declared safe.

    Megatron-core and accelerate declare some of numpy's, which do not fit together with placeholders of the
    others."""
    declared = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        add_safe_globals(declared)
