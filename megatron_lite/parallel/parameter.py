"""How a parameter is declared: its name, its whole shape, its initialisation. Said once, read by all.

Initialisation, checkpoints, weight decay and Hugging Face conversion know a parameter by the
:class:`ParameterSpec` that it carries as ``parameter.spec``; nothing else looks at module paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from megatron_lite.utils.seeds import derive_seed

CPU = torch.device("cpu")

Initializer = Callable[[torch.Tensor, torch.Generator], None]
"""Fills an fp32 CPU tensor in place, drawing from the generator."""


@dataclass(frozen=True)
class ParameterSpec:
    """What is true of a parameter under every layout.

    Attributes:
        name: global name, the same whatever the layout, e.g. ``layers.3.attention.dense.weight``.
        shape: the whole shape.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices only, not to biases and norm weights."""
        return len(self.shape) >= 2


@dataclass(frozen=True)
class ParameterFactory:
    """Makes the parameters of one module, and hands a child factory to each submodule.

    Each parameter is drawn whole, on the CPU, in fp32, from a generator keyed by the seed and its global
    name: the model is the same on every device, in every dtype and under every layout. Drawing inside the
    module's constructor (not in a loop afterwards) is what DeepSpeed's ``zero.Init`` asks for: it partitions
    a submodule as soon as the submodule's ``__init__`` returns.

    Attributes:
        seed: the run's seed.
        dtype: dtype of the parameters.
        device: where they live; ``meta`` makes them without storage and without drawing.
        prefix: global name of the module that is being built, with a trailing dot; empty at the root.
    """

    seed: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    prefix: str = ""

    def child(self, name: str) -> ParameterFactory:
        """The factory for the submodule ``name``."""
        return ParameterFactory(self.seed, self.dtype, self.device, f"{self.prefix}{name}.")

    def make(self, name: str, shape: tuple[int, ...], initializer: Initializer) -> nn.Parameter:
        """The parameter ``prefix + name`` of ``shape``, filled by ``initializer``, carrying its ``spec``."""
        spec = ParameterSpec(self.prefix + name, shape)
        if self.device.type == "meta":
            value = torch.empty(shape, dtype=self.dtype, device="meta")
        else:
            # numpy's memory: within zero.Init torch.empty gives the run's dtype, and the draw depends on it.
            value = torch.from_numpy(np.empty(shape, dtype=np.float32))
            initializer(value, torch.Generator("cpu").manual_seed(derive_seed(self.seed, spec.name)))
            value = value.to(device=self.device, dtype=self.dtype)
        parameter = nn.Parameter(value)
        parameter.spec = spec  # type: ignore[attr-defined]
        return parameter


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The declaration that ``parameter`` carries."""
    return parameter.spec  # type: ignore[attr-defined]
