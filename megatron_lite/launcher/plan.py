"""What a run needs of this machine, said before it starts; and the refusal when there is not enough."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_lite.config import Config
from megatron_lite.config.summary import short_count, summary
from megatron_lite.data.datasets import Splits
from megatron_lite.planner import (
    Machine,
    MemoryEstimate,
    Suggestion,
    estimate_memory,
    fits,
    parameters_by_place,
    suggest_fitting_keys,
)
from megatron_lite.utils.errors import ConfigError


def run_summary(config: Config, machine: Machine, ranks: int, several_hosts: bool) -> str:
    """The one page that is printed before the ranks start: ``config`` with the planner's figures.

    ``ranks`` of them run on ``machine``. ``vocab_size`` must be known.
    """
    estimate = estimate_memory(config, on_gpu=bool(machine.gpus))
    memory = [f"{_size(estimate.device_total)} a rank, estimated: {_parts(estimate.device)}"]
    if estimate.host:
        memory.append(f"and in main memory {_size(estimate.host_total)} a rank: {_parts(estimate.host)}")
    if estimate.disk:
        memory.append(f"and on NVMe {_size(estimate.disk_total)} a rank: {_parts(estimate.disk)}")
    memory.append("the hosts' memory is not checked" if several_hosts else _use(estimate, machine, ranks))
    kernels = {"attention": _attention_kernel(config, machine)}
    count = parameters_by_place(config)
    return summary(config, count.total, kernels, memory, count.active)


def tokens_line(datasets: Splits) -> str:
    """The summary's line about the data's size. Raises DataError when a file is missing or damaged."""
    valid = datasets.valid
    evaluated = f"{short_count(valid.tokens)} to evaluate on" if valid else "none to evaluate on"
    return f"{'tokens':<10}{short_count(datasets.train.tokens)} to train on, {evaluated}"


def check_fits(config: Config, machine: Machine, ranks: int) -> None:
    """Raise ConfigError when ``ranks`` ranks of ``config`` need more memory than ``machine`` has free.

    The message says how much is needed and how much there is, and names keys that would make it fit.
    """
    estimate = estimate_memory(config, on_gpu=bool(machine.gpus))
    if fits(estimate, machine, ranks):
        return
    lines = [f"this machine is too small: {_use(estimate, machine, ranks)} ({_parts(estimate.device)})."]
    suggestions = suggest_fitting_keys(config, machine, ranks)
    if suggestions:
        lines.append("By the estimate it fits with" + (" one of" if len(suggestions) > 1 else "") + ":")
        lines += [f"  {_suggestion(each, machine, ranks)}" for each in suggestions]
    else:
        lines.append(
            "No ZeRO stage, offload, activation checkpointing or smaller micro-batch makes it fit here: "
            "take a smaller model, or more machines. --force starts it all the same."
        )
    raise ConfigError("\n".join(lines))


def _suggestion(suggestion: Suggestion, machine: Machine, ranks: int) -> str:
    return f"{suggestion}    ({_use(suggestion.estimate, machine, ranks)})"


def _use(estimate: MemoryEstimate, machine: Machine, ranks: int) -> str:
    """Needed beside available, for all ranks of ``machine``."""
    main = f"of {_size(machine.memory_available)} available"
    if not machine.gpus:
        needed = ranks * (estimate.device_total + estimate.host_total)
        return f"{_ranks(ranks)} {_size(needed)} of main memory, {main}"
    smallest = min(gpu.memory_free for gpu in machine.gpus[:ranks])
    return (
        f"{_size(estimate.device_total)} of GPU memory a rank, of {_size(smallest)} free; "
        f"{_ranks(ranks)} {_size(ranks * estimate.host_total)} of main memory, {main}"
    )


def _ranks(ranks: int) -> str:
    return "1 rank needs" if ranks == 1 else f"{ranks} ranks need"


def _size(size: int) -> str:
    """Bytes for people: MB, GB, from a thousand GB on with commas."""
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _attention_kernel(config: Config, machine: Machine) -> str:
    """The kernel that ``attention_backend`` means on ``machine``: the model's rule, told without torch.

    It takes the GPUs for Ampere or newer: older ones run no flash-attn, whatever is installed.
    """
    backend = config.model.attention_backend
    if backend != "auto":
        return backend
    has_flash = (
        bool(machine.gpus)
        and config.precision.precision != "fp32"
        and config.model.head_size <= 256
        and find_spec("flash_attn") is not None
    )
    return "flash_attn" if has_flash else "sdpa"
