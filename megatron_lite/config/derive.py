"""What follows from the keys that were given: one small pure function a subject.

Each takes the keys, already of the right type, and returns the values of keys that were not given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron_lite.utils.errors import ConfigError

Keys = Mapping[str, Any]

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
"""Keys that nothing else implies."""


def derive(keys: Keys) -> dict[str, Any]:
    """``keys`` and everything that follows from them. Raises :class:`ConfigError` for contradictions."""
    keys = dict(keys)
    missing = [key for key in REQUIRED if key not in keys]
    if missing:
        raise ConfigError(
            f"the configuration does not say {', '.join(missing)}; name a model file, such as configs/demo.yml"
        )
    for rule in (_model, _parallel, _batch, _precision, _schedule, _places, _generation):
        keys = rule(keys) | keys
    return keys


def _model(keys: Keys) -> dict[str, Any]:
    hidden, heads = keys["hidden_size"], keys["num_attention_heads"]
    kv_heads = keys.get("num_kv_heads", heads)
    if hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} does not divide into {heads} attention heads; "
            f"choose num_attention_heads among the divisors of {hidden}"
        )
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
    positions, length = keys.get("max_position_embeddings", keys["seq_length"]), keys["seq_length"]
    if positions < length:
        raise ConfigError(f"max_position_embeddings {positions} is less than seq_length {length}")
    return {
        "num_kv_heads": kv_heads,
        "max_position_embeddings": positions,
        "intermediate_size": round(keys.get("expansion_factor", 4.0) * hidden),
    }


def _parallel(keys: Keys) -> dict[str, Any]:
    for key, what in (("model_parallel_size", "tensor"), ("pipe_parallel_size", "pipeline")):
        if keys.get(key, 1) > 1:
            raise ConfigError(
                f"{key} is {keys[key]}, but {what} parallelism is not available: set it to 1, and use "
                "zero_optimization to share a large model over data-parallel ranks"
            )
    return {"world_size": 1}


def _batch(keys: Keys) -> dict[str, Any]:
    """The batch triple from any part of it."""
    ranks = keys["world_size"]
    total, micro, steps = (
        keys.get(key)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if total is None:
        micro, steps = micro or 1, steps or 1
        total = micro * steps * ranks
    elif micro is None:
        steps = steps or 1
        micro = _quotient(total, steps, ranks, "gradient_accumulation_steps")
    elif steps is None:
        steps = _quotient(total, micro, ranks, "train_micro_batch_size_per_gpu")
    elif total != micro * steps * ranks:
        raise ConfigError(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {steps} x {ranks} data-parallel ranks = {micro * steps * ranks}; "
            "leave one of the three out and it is derived"
        )
    _check_ramp(keys.get("rampup_batch_size"), total, micro * ranks)
    return {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }


def _quotient(total: int, part: int, ranks: int, name: str) -> int:
    if total % (part * ranks):
        raise ConfigError(
            f"train_batch_size {total} does not divide by {name} {part} x "
            f"{ranks} data-parallel ranks = {part * ranks}"
        )
    return total // (part * ranks)


def _check_ramp(ramp: tuple[int, int, int] | None, total: int, slice_size: int) -> None:
    if ramp is None:
        return
    start, increment, _ = ramp
    if start > total or (total - start) % increment:
        raise ConfigError(
            f"rampup_batch_size goes from {start} by {increment} and does not meet train_batch_size {total}"
        )
    if start % slice_size or increment % slice_size:
        raise ConfigError(
            f"rampup_batch_size: start {start} and increment {increment} must be multiples of "
            f"micro batch x data-parallel ranks = {slice_size}"
        )


def _precision(keys: Keys) -> dict[str, Any]:
    fp16, bf16 = keys.get("fp16"), keys.get("bf16")
    asked = {keys["precision"]: "precision"} if "precision" in keys else {}
    if fp16 and fp16.enabled:
        asked.setdefault("bf16" if fp16.type == "bfloat16" else "fp16", "fp16.enabled")
    if bf16 and bf16.enabled:
        asked.setdefault("bf16", "bf16.enabled")
    if len(asked) > 1:
        reasons = " and ".join(f"{number} ({key})" for number, key in asked.items())
        raise ConfigError(f"the configuration asks for {reasons}; keep one")
    return {"precision": next(iter(asked), "fp32")}


def _schedule(keys: Keys) -> dict[str, Any]:
    iters = keys.get("lr_decay_iters", round(keys.get("lr_decay_fraction", 1.0) * keys.get("train_iters", 0)))
    ways = [key for key in ("warmup", "warmup_iters", "warmup_tokens") if key in keys]
    if "warmup_iters" in ways and "warmup_tokens" in ways:
        raise ConfigError("warmup_iters and warmup_tokens both give the length of the warm-up; keep one")
    lr = keys["optimizer"].params.lr if "optimizer" in keys else 1e-3
    if keys.get("min_lr", 0.0) > lr:
        raise ConfigError(f"min_lr {keys['min_lr']} is above the learning rate {lr} (optimizer.params.lr)")
    return {"lr_decay_iters": iters, "wsd_decay_iters": iters // 10}


def _places(keys: Keys) -> dict[str, Any]:
    run_dir = keys.get("run_dir", "runs/run")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return {
        "run_dir": run_dir,
        "save": os.path.join(run_dir, "checkpoints"),
        "data_cache_dir": os.path.join(cache, "megatron_lite"),
    }


def _generation(keys: Keys) -> dict[str, Any]:
    return {"text_gen_type": "input-file" if "sample_input_file" in keys else "unconditional"}
