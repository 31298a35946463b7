"""How large the pieces are in which NVMe offload moves a model, by formula, and DeepSpeed's keys that say so.

DeepSpeed's own defaults are for one size of model: its parameter buffers are too small for an embedding of a
1.3B-parameter model, and its optimizer buffers (four of 10^9 numbers) too large for most machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lite.config import Config
from megatron_lite.planner.parameters import parameters_on_rank

SUB_GROUP = 50_000_000
"""Numbers that the optimizer's update has in memory at a time, at least: files of 200 MB."""

OPTIMIZER_TENSORS = 4
"""What an update needs of each weight: itself, its gradient and Adam's two moments."""

PARAMETER_BUFFERS = 5
"""DeepSpeed's default of ``offload_param``'s ``buffer_count``."""


def matrices_on_rank(config: Config) -> Iterator[int]:
    """Elements of each matrix of the model on one rank, in the order of the optimizer's sub-groups.

    The same matrix of all experts of a layer that are on a rank is one parameter.
    """
    return (elements for elements, _ in _matrices(config))


def largest_slice(config: Config) -> int:
    """Elements of a rank's slice of the largest parameter under ZeRO 3."""
    return max(_slices(config))


def largest_sub_group(config: Config) -> int:
    """Elements of a rank's slice of the largest sub-group: one is full when a matrix reaches the limit."""
    limit = int(config.zero.block.get("sub_group_size", SUB_GROUP))
    largest = filled = 0
    for size in _slices(config):
        filled += size
        largest = max(largest, filled)
        filled = filled if filled < limit else 0
    return largest


def _slices(config: Config) -> Iterator[int]:
    """Elements of a rank's slice of each matrix under ZeRO 3: experts have fewer replicas than the rest."""
    ranks = partitions(config)
    for elements, is_expert in _matrices(config):
        yield -(-elements // (ranks // config.parallel.expert_parallel_size if is_expert else ranks))


def _matrices(config: Config) -> Iterator[tuple[int, bool]]:
    """(elements, whether it is experts') of each matrix on one rank."""
    model, count, tensor = config.model, parameters_on_rank(config), config.parallel.model_parallel_size
    query = model.num_attention_heads // tensor * model.head_size
    keys_and_values = 2 * -(-model.num_kv_heads // tensor) * model.head_size
    shares_keys = model.num_kv_heads < tensor  # then the keys and values that ranks share are a matrix apart
    attention = [query, keys_and_values, query] if shares_keys else [query + keys_and_values, query]
    inner = model.ffn_size // tensor
    mlp = [(2 if model.is_gated else 1) * inner, inner]
    yield count.token_embedding, False
    if count.position_embedding:
        yield count.position_embedding, False
    for kind in model.mlp_kinds[: count.layers + count.mixtures]:
        router = [model.moe_num_experts] if kind == "experts" else []
        for width in (*attention, *router):
            yield width * model.hidden_size, False
        for width in mlp:
            copies = count.experts if kind == "experts" else 1
            yield copies * width * model.hidden_size, kind == "experts"
    if count.head:
        yield count.head, False


def optimizer_buffers(config: Config) -> int:
    """Buffers of a sub-group's size: what the update works on, and what is read and written beside it."""
    block = config.zero.block["offload_optimizer"]
    at_once = 1 + bool(block.get("pipeline_read")) + bool(block.get("pipeline_write"))
    return int(block.get("buffer_count", OPTIMIZER_TENSORS * at_once))


def partitions(config: Config) -> int:
    """Ranks over which ZeRO divides a parameter."""
    return config.parallel.replicas


def swap_keys(config: Config) -> dict[str, Any]:
    """Keys of DeepSpeed's ``zero_optimization`` block that fit NVMe offload to the model.

    A key that is given stays as it is, but for two of parameters on NVMe. Each that waits in memory to be
    used again keeps one of ``buffer_count`` buffers, so none waits. And none is read ahead: DeepSpeed forgets
    what it has read when the optimizer updates the file, and ends in an assertion, or with weights of before.
    """
    block = config.zero.block
    keys: dict[str, Any] = {}
    if config.zero.swaps_optimizer:
        keys["sub_group_size"] = block.get("sub_group_size", SUB_GROUP)
        keys["offload_optimizer"] = {"buffer_count": optimizer_buffers(config), **block["offload_optimizer"]}
    if config.zero.swaps_parameters:
        keys |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        keys["offload_param"] = {"buffer_size": largest_slice(config), **block["offload_param"]}
    return keys
