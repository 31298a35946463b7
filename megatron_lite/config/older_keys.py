"""Keys of GPT-NeoX's and DeepSpeed's files that say what another says here; rewritten once all are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_lite.config.reader import Entry
from megatron_lite.utils.errors import ConfigError

FUSED_GELU = "bias_gelu_fusion"

OFFLOADS = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}
"""Keys of ``zero_optimization``: the old name, a flag, and the block that has taken its place."""

MAX_NORM = "optimizer.params.max_grad_norm"
THREADS = "aio.thread_count"

REWRITTEN = {
    FUSED_GELU: "with `activation: gelu`, true is `activation: gelu_tanh`: GPT-NeoX's fused kernel computes "
    "GELU by its tanh approximation",
    **{
        f"zero_optimization.{old}": f"true is `zero_optimization.{new}: {{device: cpu}}`"
        for old, new in OFFLOADS.items()
    },
    MAX_NORM: "`gradient_clipping`",
    THREADS: "`aio.intra_op_parallelism`, as DeepSpeed calls it now",
}
"""What each of them means, in Markdown."""


def rewrite(merged: Mapping[str, Entry], messages: list[str]) -> dict[str, Entry]:
    """``merged`` without the older keys, and with the keys that say the same.

    What changes the model is told in ``messages``. Raises :class:`ConfigError` when one is not true or false,
    or disagrees with the key that it stands for.
    """
    return _threads(_clipping(_offloads(_activation(dict(merged), messages))))


def _activation(keys: dict[str, Entry], messages: list[str]) -> dict[str, Entry]:
    fused = keys.pop(FUSED_GELU, None)
    if fused is None or not _flag(fused, FUSED_GELU, fused.value):
        return keys
    given = keys.get("activation", Entry("activation", "gelu"))
    if given.value == "gelu":
        keys["activation"] = replace(fused, key="activation", value="gelu_tanh")
        messages.append(
            f"{fused.where()}{FUSED_GELU} makes the activation gelu_tanh, as GPT-NeoX's kernel has it"
        )
    elif given.value != "gelu_tanh":
        messages.append(f"{fused.where()}{FUSED_GELU} has no effect: the activation is {given.value}")
    return keys


def _offloads(keys: dict[str, Entry]) -> dict[str, Entry]:
    zero = keys.get("zero_optimization")
    if zero is None or not isinstance(zero.value, dict):
        return keys
    block: dict[str, Any] = dict(zero.value)
    for old, new in OFFLOADS.items():
        name = f"zero_optimization.{old}"
        if not _flag(zero, name, block.pop(old, False)):
            continue
        other = block.setdefault(new, {"device": "cpu"})
        if not isinstance(other, dict) or other.get("device") != "cpu":
            raise ConfigError(
                f"{zero.where(name)}{name} means {new}: {{device: cpu}}, but {new} is {other}: keep one"
            )
    keys["zero_optimization"] = replace(zero, value=block)
    return keys


def _clipping(keys: dict[str, Entry]) -> dict[str, Entry]:
    optimizer = keys.get("optimizer")
    params = optimizer.value.get("params") if optimizer and isinstance(optimizer.value, dict) else None
    if optimizer is None or not isinstance(params, dict) or "max_grad_norm" not in params:
        return keys
    norm = params["max_grad_norm"]
    clipping = keys.setdefault("gradient_clipping", replace(optimizer, key="gradient_clipping", value=norm))
    if clipping.value != norm:
        raise ConfigError(
            f"{optimizer.where(MAX_NORM)}{MAX_NORM} is {norm}, but gradient_clipping is {clipping.value}: "
            "keep one"
        )
    rest = {name: value for name, value in params.items() if name != "max_grad_norm"}
    keys["optimizer"] = replace(optimizer, value={**optimizer.value, "params": rest})
    return keys


def _threads(keys: dict[str, Entry]) -> dict[str, Entry]:
    aio = keys.get("aio")
    if aio is None or not isinstance(aio.value, dict) or "thread_count" not in aio.value:
        return keys
    block = dict(aio.value)
    count = block.pop("thread_count")
    if block.setdefault("intra_op_parallelism", count) != count:
        raise ConfigError(
            f"{aio.where(THREADS)}{THREADS} is {count}, but aio.intra_op_parallelism is "
            f"{block['intra_op_parallelism']}: keep one"
        )
    keys["aio"] = replace(aio, value=block)
    return keys


def _flag(entry: Entry, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{entry.where(key)}{key} should be true or false, got {value!r}")
    return value
