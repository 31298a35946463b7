"""What the parallel degrees imply, and what they ask of the other keys."""

from __future__ import annotations

from math import lcm, prod
from typing import Any

from megatron_lite.config.contradiction import Contradiction, Keys
from megatron_lite.config.sections.model import ffn_size


def derive_ranks(keys: Keys) -> dict[str, Any]:
    """The ranks are a grid: tensor x context x data x pipeline."""
    tensor, replica = keys.get("model_parallel_size", 1), replica_size(keys)
    ranks = keys.get("world_size", replica)
    if ranks % replica:
        product = " x ".join(f"{key} {keys.get(key, 1)}" for key in DEGREES)
        raise Contradiction(
            f"{ranks} ranks do not divide into replicas of {product} = {replica}: start a multiple of "
            f"{replica} ranks, or choose degrees whose product divides {ranks}",
            *DEGREES,
        )
    shards = _shards(keys, tensor)
    _check_context(keys)
    return {"world_size": replica} | shards


DEGREES = ("model_parallel_size", "context_parallel_size", "pipe_parallel_size")
"""Keys of the degrees that make up a replica: one copy of the model, and one sequence at a time."""


def replica_size(keys: Keys) -> int:
    """Ranks of a replica."""
    return prod(max(keys.get(key, 1), 1) for key in DEGREES)


def context_kind(kind: str, heads: int, tensor: int, context: int) -> str:
    """What `context_parallel_kind` means: `ulysses` or `ring`."""
    if kind == "auto":
        return "ring" if heads // tensor % context else "ulysses"
    return kind


def _check_context(keys: Keys) -> None:
    """What context parallelism divides must divide."""
    size, tensor = keys.get("context_parallel_size", 1), keys.get("model_parallel_size", 1)
    if size == 1:
        return
    heads, length = keys["num_attention_heads"], keys["seq_length"]
    kind = context_kind(keys.get("context_parallel_kind", "auto"), heads, tensor, size)
    if kind == "ulysses" and heads // tensor % size:
        raise Contradiction(
            f"ulysses cannot divide {heads // tensor} attention heads over context_parallel_size {size} "
            "ranks: use context_parallel_kind: ring, or another degree",
            "context_parallel_kind",
            "context_parallel_size",
        )
    slices = tensor if keys.get("sequence_parallel") else 1
    # A ring rank has two chunks, which the slices of sequence parallelism may cut anywhere.
    parts = lcm(2 * size, size * slices) if kind == "ring" else size * slices
    if length % parts:
        raise Contradiction(
            f"{kind} with context_parallel_size {size} cannot divide seq_length {length} into {parts} equal "
            f"parts: choose a multiple of {parts}",
            "context_parallel_size",
            "seq_length",
        )


def _shards(keys: Keys, tensor: int) -> dict[str, Any]:
    """What tensor parallelism divides must divide."""
    heads, kv_heads = keys["num_attention_heads"], keys["num_kv_heads"]
    divided = {"num_attention_heads": heads}
    width = ffn_size(
        keys["intermediate_size"], keys.get("activation", "gelu"), keys.get("mlp_multiple_of", 1)
    )
    divided["mlp_multiple_of"] = width
    if keys.get("vocab_size") is not None:
        multiple = keys.get("make_vocab_size_divisible_by", 128)
        divided["make_vocab_size_divisible_by"] = -(-keys["vocab_size"] // multiple) * multiple
    for key, size in divided.items():
        if size % tensor:
            raise Contradiction(
                f"model_parallel_size {tensor} does not divide {DIVIDED[key]} {size}: choose another "
                f"model_parallel_size or {key}",
                "model_parallel_size",
                key,
            )
    if kv_heads % tensor and tensor % kv_heads:
        raise Contradiction(
            f"{kv_heads} key/value heads can neither be divided over model_parallel_size {tensor} ranks nor "
            "shared by equal numbers of them: choose a degree that divides num_kv_heads, or a multiple of it",
            "model_parallel_size",
            "num_kv_heads",
        )
    if keys.get("sequence_parallel") and keys["seq_length"] % tensor:
        raise Contradiction(
            f"sequence_parallel cannot divide seq_length {keys['seq_length']} into {tensor} slices: choose a "
            "seq_length that is a multiple of model_parallel_size",
            "sequence_parallel",
            "seq_length",
        )
    kind = keys["optimizer"].type if keys.get("optimizer") else ""
    if tensor > 1 and kind.lower() in WHOLE_MATRICES:
        raise Contradiction(
            f"{kind} needs whole matrices, and with model_parallel_size {tensor} no rank has them: use AdamW "
            "or use ZeRO instead of model_parallel_size",
            "optimizer",
            "model_parallel_size",
        )
    return {}


WHOLE_MATRICES = ("muon", "adafactor")
"""Optimizers whose update of an element depends on its whole row and column."""

DIVIDED = {
    "num_attention_heads": "the number of attention heads",
    "mlp_multiple_of": "the inner width of the MLP",
    "make_vocab_size_divisible_by": "the padded vocabulary of",
}
"""What is divided over the tensor-parallel ranks, by the key that changes it."""


def data_ranks(keys: Keys) -> int:
    """The data-parallel degree."""
    return int(keys["world_size"] // replica_size(keys))


def check_experts(keys: Keys) -> dict[str, Any]:
    """What goes with experts, and with dividing them over ranks."""
    experts, ranks = keys.get("moe_num_experts", 1), keys.get("expert_parallel_size", 1)
    if experts == 1:
        if ranks > 1:
            raise Contradiction(
                f"expert_parallel_size {ranks} has no experts to divide: set it to 1, or set moe_num_experts",
                "expert_parallel_size",
            )
        return {}
    if keys.get("moe_top_k", 1) > experts:
        raise Contradiction(
            f"moe_top_k {keys['moe_top_k']} is more than moe_num_experts {experts}",
            "moe_top_k",
            "moe_num_experts",
        )
    kind = keys["optimizer"].type if keys.get("optimizer") else ""
    if kind in WHOLE_MATRICES:
        raise Contradiction(
            f"{kind} would take all experts of a layer for one matrix: use AdamW, or moe_num_experts 1",
            "optimizer",
            "moe_num_experts",
        )
    return {} if ranks == 1 else _check_divided_experts(keys, experts, ranks)


def _check_divided_experts(keys: Keys, experts: int, ranks: int) -> dict[str, Any]:
    replicas = data_ranks(keys) * keys.get("context_parallel_size", 1)
    for key, divided, what in (
        ("moe_num_experts", experts, "experts"),
        ("world_size", replicas, "data-parallel (and context-parallel) ranks"),
    ):
        if divided % ranks:
            raise Contradiction(
                f"expert_parallel_size {ranks} does not divide the {divided} {what}: choose a divisor",
                "expert_parallel_size",
                key,
            )
    stages, interval = keys.get("pipe_parallel_size", 1), keys.get("expert_interval", 2)
    each = keys["num_layers"] // max(stages, 1)
    if stages > 1 and interval > each:
        raise Contradiction(
            f"expert_parallel_size {ranks} needs experts in every stage, and one of {each} layers "
            f"may have none with expert_interval {interval}: choose {each}, or fewer stages",
            "expert_interval",
            "pipe_parallel_size",
        )
    for key, value in _refused_with_experts(keys).items():
        raise Contradiction(
            f"zero_optimization.{key} {value} does not go with expert_parallel_size {ranks}: leave it out",
            "zero_optimization",
            "expert_parallel_size",
        )
    return {}


def _refused_with_experts(keys: Keys) -> dict[str, Any]:
    """The settings of ZeRO that do not go with divided experts."""
    zero = keys.get("zero_optimization")
    if zero is None:
        return {}
    found: dict[str, Any] = {}
    for key in ("reduce_scatter", "contiguous_gradients"):
        if (zero.model_extra or {}).get(key) is False:
            found[key] = "false"
    if zero.stage == 3:  # these are shared by other ranks than those that have the same experts
        if (zero.zero_hpz_partition_size or 1) > 1:
            found["zero_hpz_partition_size"] = zero.zero_hpz_partition_size
        if zero.zero_quantized_gradients:
            found["zero_quantized_gradients"] = "true"
    return found


def check_stages(keys: Keys) -> dict[str, Any]:
    """What goes with pipeline stages."""
    stages = keys.get("pipe_parallel_size", 1)
    if stages <= 1:
        return {}
    if keys["num_layers"] < stages:
        raise Contradiction(
            f"pipe_parallel_size {stages} is more than num_layers {keys['num_layers']}: choose fewer stages",
            "pipe_parallel_size",
            "num_layers",
        )
    zero, block = keys.get("zero_optimization"), keys.get("optimizer")
    if zero is not None and zero.stage > 1:
        raise Contradiction(
            f"zero_optimization.stage {zero.stage} does not go with pipe_parallel_size {stages}, whose "
            "micro-batches are in flight at the same time: use stage 1 or 0, or pipe_parallel_size 1",
            "zero_optimization",
            "pipe_parallel_size",
        )
    if block is not None and block.type in WHOLE_MATRICES:  # Adafactor's copies of tied weights would part
        raise Contradiction(
            f"{block.type.capitalize()} does not go with pipe_parallel_size {stages}: choose another "
            "optimizer.type",
            "optimizer",
            "pipe_parallel_size",
        )
    return {}
