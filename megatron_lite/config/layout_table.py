"""The layout as a table: which ranks work together, and what of the model each of them holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_lite.config.config import Config
from megatron_lite.config.placement import AXES, axis_sizes, expert_groups, groups_along

SHOWN_RANKS = 32
"""Ranks of a line of the table of groups; the others are counted."""

DIVIDED = ("the optimizer's states", "the gradients", "the weights")
"""What ZeRO divides over the replicas from stage 1, 2, 3 on."""

EVEN_METHOD = "type:transformer|mlp"
"""The method that counts blocks only: it gives stages equal numbers of them."""


def group_lines(config: Config) -> list[str]:
    """A line for each kind of parallelism that is used, if there are several: its groups of ranks."""
    sizes = axis_sizes(config.parallel)
    used = [axis for axis in reversed(AXES) if sizes[axis] > 1]
    experts = config.parallel.expert_parallel_size
    if len(used) < 2 and sizes["data"] == config.parallel.world_size and experts == 1:
        return []
    lines = [_group_line(axis, groups_along(sizes, axis)) for axis in used]
    return lines if experts == 1 else [*lines, _group_line("expert", expert_groups(sizes, experts))]


def holdings(config: Config) -> list[str]:
    """A line for each kind of parallelism: what a rank has of what its group divides; nothing undivided."""
    parallel, model = config.parallel, config.model
    lines = [", ".join(_of_layers(config))] if parallel.model_parallel_size > 1 else []
    if parallel.pipe_parallel_size > 1:
        lines.append(f"{_stage(config)} of {model.num_layers} layers")
    if parallel.context_parallel_size > 1:
        lines.append(_part(model.seq_length, parallel.context_parallel_size, "tokens of a sequence"))
    if parallel.expert_parallel_size > 1:
        lines.append(_part(model.moe_num_experts, parallel.expert_parallel_size, "experts of a layer"))
    replicas = parallel.data_parallel_size * parallel.context_parallel_size
    if config.engine_stage and replicas > 1:
        lines.append(f"1/{replicas} of " + " and of ".join(DIVIDED[: config.engine_stage]))
    return lines


def _of_layers(config: Config) -> Iterator[str]:
    """What tensor parallelism leaves a rank: of attention, of the MLP, of embedding and head."""
    model, ranks = config.model, config.parallel.model_parallel_size
    yield _part(model.num_attention_heads, ranks, "heads")
    if model.num_kv_heads != model.num_attention_heads:
        yield f"{max(model.num_kv_heads // ranks, 1)} of {model.num_kv_heads} key/value heads"
    yield _part(model.ffn_size, ranks, "channels of the MLP")
    if model.vocab_size is not None:
        yield _part(model.padded_vocab_size, ranks, "tokens of the vocabulary")


def _stage(config: Config) -> str:
    """Layers of a pipeline stage, where the method divides them evenly; else about how many."""
    layers, stages = config.model.num_layers, config.parallel.pipe_parallel_size
    if layers % stages or config.parallel.pipe_partition_method != EVEN_METHOD:
        return f"about {layers / stages:.3g}"
    return str(layers // stages)


def _part(size: int, ranks: int, what: str) -> str:
    return f"{size // ranks:,} of {size:,} {what}"


def _group_line(axis: str, groups: list[list[int]]) -> str:
    size = len(groups[0])
    shown = groups[: max(1, SHOWN_RANKS // size)]
    ranks = " | ".join(_members(group) for group in shown)
    more = f" | and {len(groups) - len(shown)} more" if len(groups) > len(shown) else ""
    return f"{axis:<7}{size:>4}  ranks {ranks}{more}"


def _members(group: Sequence[int]) -> str:
    """The ranks of a group; of a long one the first two and the last."""
    if len(group) <= SHOWN_RANKS // 2:
        return " ".join(map(str, group))
    return f"{group[0]} {group[1]} ... {group[-1]}"
