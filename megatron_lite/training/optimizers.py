"""Optimizers by name. A new one is one function and one line in :data:`OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from megatron_lite.config.sections.optimizer import OptimizerSection
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.training.experts import group_marks
from megatron_lite.training.lion import Lion
from megatron_lite.utils.errors import ConfigError

Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Matrices, which decay, and the rest (biases, norm weights), which do not; no empty group.

    Experts that are divided over ranks have groups of their own.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Groups = []
    for is_divided, decays in product((False, True), (True, False)):
        chosen = [p for p in trainable if bool(group_marks(p)) == is_divided and spec_of(p).decays == decays]
        if chosen:
            decay = weight_decay if decays else 0.0
            groups.append({"params": chosen, "weight_decay": decay, **group_marks(chosen[0])})
    return groups


def adamw(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) in torch's fused kernel, on CPU and on CUDA.

    The fused kernel is the fast one on a CPU as well: 17 ms for 20M parameters where the multi-tensor
    one takes 104 ms, and needs no compiler.
    """
    return torch.optim.AdamW(
        groups, lr=keys.lr, betas=keys.betas, eps=keys.eps, **{"fused": True, **keys.params}
    )


def cpu_adam(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """DeepSpeed's vectorised AdamW for states in CPU memory (compiled on first use)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, lr=keys.lr, betas=keys.betas, eps=keys.eps, **keys.params)


def fused_adam(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """DeepSpeed's multi-tensor AdamW (compiled on first use)."""
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, lr=keys.lr, betas=keys.betas, eps=keys.eps, **keys.params)


def lion(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """Lion (see :mod:`megatron_lite.training.lion`)."""
    return Lion(groups, lr=keys.lr, betas=keys.betas, **keys.params)


def sgd(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """Stochastic gradient descent with (heavy-ball) momentum."""
    return torch.optim.SGD(groups, lr=keys.lr, momentum=keys.momentum, **{"fused": True, **keys.params})


def adafactor(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018): second moments factored into rows and columns.

    Under ZeRO parameters are flat slices without rows, and the second moments are kept whole.
    """
    return torch.optim.Adafactor(groups, lr=keys.lr, **keys.params)


def muon(groups: Groups, keys: OptimizerSection) -> Optimizer:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for embeddings, head and vectors.

    ``momentum`` (0.95 when not given) is Muon's, ``betas`` and ``eps`` are AdamW's. The schedule's rate is
    Muon's; ``adam_lr`` in ``params`` is AdamW's peak, which moves in proportion (default: the same).
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    params = dict(keys.params)
    ratio = params.pop("adam_lr", keys.lr) / keys.lr
    momentum = {"momentum": keys.momentum or 0.95, **params}
    adam = {"betas": keys.betas, "eps": keys.eps, "lr_ratio": ratio}
    halves = for_muon(groups)
    for half in halves:
        half |= {**(momentum if half["use_muon"] else adam), "lr": keys.lr}
        for parameter in half["params"]:
            parameter.use_muon = half["use_muon"]
    return MuonWithAuxAdam(halves)


def for_muon(groups: Groups) -> Groups:
    """Each of ``groups`` in two, what Muon updates and what Adam updates (``use_muon``); no empty one.

    What Muon updates is in the order into which DeepSpeed's Muon sorts it.
    """
    halves = []
    for group in groups:
        for use_muon in (True, False):
            chosen = [p for p in group["params"] if is_hidden_matrix(p) == use_muon]
            if use_muon:
                chosen.sort(key=lambda parameter: parameter.size(), reverse=True)
            if chosen:
                halves.append({**group, "params": chosen, "use_muon": use_muon})
    return halves


def is_hidden_matrix(parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is a matrix inside the layers, not an embedding, the head or a vector."""
    spec = spec_of(parameter)
    return spec.decays and spec.name.startswith("layers.")


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerSection], Optimizer]] = {
    "adamw": adamw,
    "cpu_adam": cpu_adam,
    "fused_adam": fused_adam,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
    "adafactor": adafactor,
}
"""By the names that the configuration resolves ``optimizer.type`` to."""


def build_optimizer(keys: OptimizerSection, model: nn.Module) -> Optimizer:
    """The optimizer that ``keys`` name, over the parameters of ``model`` (each carrying its ``spec``).

    Raises ConfigError when ``params`` holds an argument that the optimizer does not take.
    """
    try:
        return OPTIMIZERS[keys.type](parameter_groups(model, keys.weight_decay), keys)
    except TypeError as error:
        raise ConfigError(f"optimizer.params: {keys.type} does not take this: {error}") from error


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Let the next step of ``optimizer`` use ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
