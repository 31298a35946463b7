"""What follows from the keys that were given: one small pure function a subject.

Each takes the keys, already of the right type, checks that they agree, and returns values for keys that were
not given."""

from __future__ import annotations

import os
from typing import Any

from megatron_lite.config.attention import attention_kinds
from megatron_lite.config.contradiction import Contradiction, Keys
from megatron_lite.config.data_rules import check_data
from megatron_lite.config.inner_keys import unknown
from megatron_lite.config.layout_rules import check_experts, check_stages, data_ranks, derive_ranks
from megatron_lite.config.neox import REFUSED
from megatron_lite.config.position_rules import check_length, check_positions, check_rope_scaling
from megatron_lite.config.schema import SECTION_OF
from megatron_lite.config.sections.deepspeed import EXTRA
from megatron_lite.utils.errors import ConfigError

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
"""Keys that nothing else implies."""


def derive(keys: Keys) -> dict[str, Any]:
    """``keys`` and all that follows from them. Raises :class:`ConfigError` when keys are missing or
    disagree."""
    keys = dict(keys)
    missing = [key for key in REQUIRED if key not in keys]
    if missing:
        raise ConfigError(
            f"the configuration does not say {', '.join(missing)}: add a model file such as configs/demo.yml"
        )
    for rule in RULES:
        keys = rule(keys) | keys
    return keys


def _heads(keys: Keys) -> dict[str, Any]:
    hidden, heads = keys["hidden_size"], keys["num_attention_heads"]
    kv_heads = keys.get("num_kv_heads", heads)
    if hidden % heads and keys.get("kv_channels") is None:
        raise Contradiction(
            f"hidden_size {hidden} does not divide into {heads} heads: "
            "choose a num_attention_heads that divides hidden_size, or give the width of a head, kv_channels",
            "hidden_size",
            "num_attention_heads",
        )
    if heads % kv_heads:
        raise Contradiction(
            f"{heads} attention heads cannot share {kv_heads} key/value heads equally: "
            "choose a num_kv_heads that divides num_attention_heads",
            "num_attention_heads",
            "num_kv_heads",
        )
    biases = keys.get("use_bias_in_attn_linear", True)
    return {"num_kv_heads": kv_heads, "use_bias_in_qkv": biases, "use_bias_in_attn_output": biases}


def _head(keys: Keys) -> dict[str, Any]:
    if keys.get("use_bias_in_head") and not keys.get("no_weight_tying"):
        raise Contradiction(
            "a head that is the embedding has no bias: set no_weight_tying, or leave out use_bias_in_head",
            "use_bias_in_head",
            "no_weight_tying",
        )
    return {}


def _lengths(keys: Keys) -> dict[str, Any]:
    length = keys["seq_length"]
    positions = keys.get("max_position_embeddings", length)
    check_length(keys, positions)
    kinds = attention_kinds(keys.get("attention_config"), keys["num_layers"])
    if "local" in kinds and keys.get("sliding_window_width") is None:
        raise Contradiction(
            "attention_config names local layers: say with sliding_window_width how many tokens they see",
            "attention_config",
        )
    width = round(keys.get("expansion_factor", 4.0) * keys["hidden_size"])
    return {"max_position_embeddings": positions, "intermediate_size": width}


BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch(keys: Keys) -> dict[str, Any]:
    """The batch triple from any part of it: total = micro x steps x data-parallel ranks."""
    ranks = data_ranks(keys)
    total, micro, steps = (keys.get(key) for key in BATCH)
    if total is None:
        micro, steps = micro or 1, steps or 1
        total = micro * steps * ranks
    elif micro is None:
        steps = steps or 1
        micro = _share(total, steps, ranks, "gradient_accumulation_steps")
    elif steps is None:
        steps = _share(total, micro, ranks, "train_micro_batch_size_per_gpu")
    elif total != micro * steps * ranks:
        raise Contradiction(
            f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {steps} x {ranks} data-parallel ranks is {micro * steps * ranks}: "
            "leave one of the three out",
            *BATCH,
        )
    return dict(zip(BATCH, (total, micro, steps), strict=True))


def _share(total: int, part: int, ranks: int, name: str) -> int:
    if total % (part * ranks):
        raise Contradiction(
            f"train_batch_size {total} is not a multiple of {name} {part} x {ranks} data-parallel ranks = "
            f"{part * ranks}",
            "train_batch_size",
            name,
        )
    return total // (part * ranks)


def _ramp(keys: Keys) -> dict[str, Any]:
    ramp = keys.get("rampup_batch_size")
    if ramp is None:
        return {}
    start, increment, _ = ramp
    total = keys["train_batch_size"]
    unit = keys["train_micro_batch_size_per_gpu"] * data_ranks(keys)
    if start > total or (total - start) % increment:
        raise Contradiction(
            f"a batch that grows from {start} by {increment} does not meet train_batch_size {total}",
            "rampup_batch_size",
        )
    if start % unit or increment % unit:
        raise Contradiction(
            f"the batch grows from {start} by {increment}; both must be multiples of "
            f"train_micro_batch_size_per_gpu x data-parallel ranks = {unit}",
            "rampup_batch_size",
        )
    return {}


def _precision(keys: Keys) -> dict[str, Any]:
    fp16, bf16 = keys.get("fp16"), keys.get("bf16")
    asked = {keys["precision"]: "precision"} if "precision" in keys else {}
    if fp16 and fp16.enabled:
        asked.setdefault("bf16" if fp16.type == "bfloat16" else "fp16", "fp16")
    if bf16 and bf16.enabled:
        asked.setdefault("bf16", "bf16")
    if len(asked) > 1:
        both = " and ".join(f"{number} (by {key})" for number, key in asked.items())
        raise Contradiction(
            f"the configuration asks for {both}: keep one, for example with fp16.enabled=false",
            *asked.values(),
        )
    return {"precision": next(iter(asked), "fp32")}


def _optimizer(keys: Keys) -> dict[str, Any]:
    block = keys.get("optimizer")
    decay = (block.params.model_extra or {}).get("weight_decay") if block else None
    if decay is not None and keys.get("weight_decay", decay) != decay:
        raise Contradiction(
            f"weight_decay is {keys['weight_decay']}, but optimizer.params.weight_decay is {decay}: keep one",
            "weight_decay",
            "optimizer",
        )
    lr = block.params.lr if block else 1e-3
    if keys.get("min_lr", 0.0) > lr:
        raise Contradiction(f"min_lr {keys['min_lr']} is above the learning rate {lr}", "min_lr", "optimizer")
    zero = keys.get("zero_optimization")
    if block and block.type == "adafactor" and zero and zero.stage == 3:
        raise Contradiction(
            "Adafactor diverges under ZeRO stage 3 (DeepSpeed leaves the padding of its shards unset, and "
            "Adafactor's means read it): use stage 2, or AdamW",
            "optimizer",
            "zero_optimization",
        )
    return {} if decay is None else {"weight_decay": decay}


def _schedule(keys: Keys) -> dict[str, Any]:
    fraction = keys.get("lr_decay_fraction", 1.0)
    iters = keys.get("lr_decay_iters", round(fraction * keys.get("train_iters", 0)))
    if "warmup_iters" in keys and "warmup_tokens" in keys:
        raise Contradiction(
            "warmup_iters and warmup_tokens both give the length of the warm-up: keep one",
            "warmup_iters",
            "warmup_tokens",
        )
    if iters and keys.get("warmup_iters", 0) > iters:
        raise Contradiction(
            f"warmup_iters {keys['warmup_iters']} is longer than lr_decay_iters {iters}",
            "warmup_iters",
            "lr_decay_iters",
        )
    return {"lr_decay_iters": iters, "wsd_decay_iters": iters // 10}


def _offload(keys: Keys) -> dict[str, Any]:
    block = keys.get("zero_optimization")
    if block is None:
        return {}
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (getattr(block, name) or {}).get("device", "none")
        if device != "none" and block.stage < lowest:
            raise Contradiction(
                f"zero_optimization.{name} needs stage {lowest} or above, but the stage is {block.stage}",
                "zero_optimization",
            )
    return {}


def _paths(keys: Keys) -> dict[str, Any]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return {
        "save": os.path.join(keys["run_dir"], "checkpoints"),
        "data_cache_dir": os.path.join(cache, "megatron_lite"),
    }


def _documents(keys: Keys) -> dict[str, Any]:
    whole = keys.get("pack_impl", "packed") != "packed"
    if keys.get("reset_position_ids") and not (whole or keys.get("reset_attention_mask")):
        raise Contradiction(
            "reset_position_ids gives tokens that see each other the same positions: set "
            "reset_attention_mask too, or remove it",
            "reset_position_ids",
        )
    return {"reset_position_ids": whole}


def _generation(keys: Keys) -> dict[str, Any]:
    return {"text_gen_type": "input-file" if "sample_input_file" in keys else "unconditional"}


def _extra(keys: Keys) -> dict[str, Any]:
    """DeepSpeed's own keys must not say again, or otherwise, what keys of ours say."""
    for key, value in (keys.get("deepspeed_extra_args") or {}).items():
        if key in REFUSED and not REFUSED[key].is_neutral(value):
            raise Contradiction(
                f"deepspeed_extra_args.{key} cannot be {value!r}: {REFUSED[key].why}", "deepspeed_extra_args"
            )
        if SECTION_OF.get(key, "deepspeed") != "deepspeed":
            raise Contradiction(
                f"deepspeed_extra_args.{key} is a key of its own: write it outside of deepspeed_extra_args",
                "deepspeed_extra_args",
            )
        if key not in {*EXTRA, *SECTION_OF, *REFUSED}:
            raise Contradiction(
                f"deepspeed_extra_args: {unknown(key, [*EXTRA, *SECTION_OF])}", "deepspeed_extra_args"
            )
    return {}


RULES = (
    _heads,
    _head,
    _lengths,
    check_positions,
    check_rope_scaling,
    derive_ranks,
    _batch,
    _ramp,
    _precision,
    _optimizer,
    _schedule,
    _offload,
    check_stages,
    check_experts,
    check_data,
    _paths,
    _documents,
    _generation,
    _extra,
)
"""In the order in which they build on each other."""
