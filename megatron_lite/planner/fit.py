"""Does a run fit on this machine, and if not: which keys would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lite.config import Config
from megatron_lite.planner.machine import Machine
from megatron_lite.planner.memory import MemoryEstimate, estimate_memory
from megatron_lite.utils.errors import ConfigError

Keys = dict[str, Any]
"""Dotted key → value, as ``--set`` takes them."""


@dataclass(frozen=True)
class Suggestion:
    """Keys that make a run fit.

    Attributes:
        keys: dotted key → value, as ``--set`` takes them.
        estimate: what one rank needs with them.
    """

    keys: Keys
    estimate: MemoryEstimate

    def __str__(self) -> str:
        """The keys as they are typed: ``--set key=value key=value``."""
        return "--set " + " ".join(f"{key}={_yaml(value)}" for key, value in self.keys.items())


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def fits(estimate: MemoryEstimate, machine: Machine, ranks: int) -> bool:
    """Whether ``ranks`` ranks, each needing ``estimate``, fit: each on its GPU, or all in main memory."""
    if machine.gpus:
        on_devices = estimate.device_total <= min(gpu.memory_free for gpu in machine.gpus[:ranks])
        return on_devices and ranks * estimate.host_total <= machine.memory_available
    return ranks * (estimate.device_total + estimate.host_total) <= machine.memory_available


def suggest_fitting_keys(config: Config, machine: Machine, ranks: int) -> list[Suggestion]:
    """What would make ``config`` fit on ``machine`` with ``ranks`` ranks there, the least intrusive first.

    Each suggestion fits by the estimate. Single changes are preferred; when no single change is enough, one
    combination; when nothing is, an empty list. None changes the mathematics of the run: the global batch
    stays, and so do precision and model.
    """
    changes = list(_changes(config, bool(machine.gpus)))
    singles: dict[frozenset[str], Suggestion] = {}
    for keys in changes:
        found = _try(config, machine, ranks, keys)
        if found:  # of the values of one key, the first that fits is the least intrusive
            singles.setdefault(frozenset(keys), found)
    if singles:
        return list(singles.values())
    combined: Keys = {}
    for keys in changes:
        combined |= keys
        if _try(config, machine, ranks, combined):
            break
    needed = dict(combined)
    for keys in changes:
        without = {key: value for key, value in needed.items() if key not in keys}
        if _try(config, machine, ranks, without):
            needed = without
    found = _try(config, machine, ranks, needed)
    return [found] if found else []


def _changes(config: Config, on_gpu: bool) -> Iterator[Keys]:
    """Changes to try, from the one that costs a run least to the one that costs most."""
    stage = config.zero.stage
    if config.parallel.replicas > 1:
        for higher in range(stage + 1, 4):
            yield {"zero_optimization.stage": higher}
    if not config.model.checkpoint_activations:
        yield {"checkpoint_activations": True}
    micro, steps = config.batch.train_micro_batch_size_per_gpu, config.batch.gradient_accumulation_steps
    smaller = micro // 2
    while smaller >= 1:
        if micro % smaller == 0:
            yield {
                "train_micro_batch_size_per_gpu": smaller,
                "gradient_accumulation_steps": steps * micro // smaller,
            }
        smaller //= 2
    if on_gpu and not config.zero.offload_optimizer:
        yield {"zero_optimization.stage": max(stage, 1), "zero_optimization.offload_optimizer.device": "cpu"}
    if on_gpu and not config.zero.offload_param:
        yield {
            "zero_optimization.stage": 3,
            "zero_optimization.offload_optimizer.device": "cpu",
            "zero_optimization.offload_param.device": "cpu",
        }


def _try(config: Config, machine: Machine, ranks: int, keys: Keys) -> Suggestion | None:
    """``keys`` as a suggestion if they are allowed and fit, else None."""
    try:
        estimate = estimate_memory(config.with_keys(**keys), on_gpu=bool(machine.gpus))
    except ConfigError:  # this change is not allowed together with the run's other keys
        return None
    return Suggestion(dict(keys), estimate) if fits(estimate, machine, ranks) else None
