"""Which rank stands where: against DeepSpeed's own grid, and the process groups made on real ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from ranks import run_ranks

from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.layout_table import holdings
from megatron_lite.config.placement import axis_sizes, coordinates, groups_along
from megatron_lite.config.summary import summary

GRIDS = [grid for grid in itertools.product((1, 2, 3), (1, 2), (1, 2, 4)) if max(grid) > 1]
"""(pipeline stages, data replicas, tensor shards)"""


def make(stages: int, replicas: int, shards: int) -> Config:
    keys: dict[str, Any] = {"num_layers": 6, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8}
    degrees = {"pipe_parallel_size": stages, "model_parallel_size": shards}
    return config_from_keys(keys | degrees | {"data_path": "x"}, world_size=stages * replicas * shards)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_grid_is_deepspeeds(grid: tuple[int, int, int]) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    stages, replicas, shards = grid
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=shards, num_dp=replicas)
    sizes = axis_sizes(make(*grid).parallel)
    for rank in range(topology.world_size()):
        theirs = topology.get_coord(rank)
        ours = coordinates(sizes, rank)
        assert (ours["pipe"], ours["data"], ours["tensor"]) == (theirs.pipe, theirs.data, theirs.model)
    for axis, name in (("pipe", "pipe"), ("data", "data"), ("tensor", "model")):
        if sizes[axis] > 1:  # DeepSpeed lists no groups of one
            assert sorted(groups_along(sizes, axis)) == sorted(topology.get_axis_comm_lists(name))


def sums_along_axes(grid: tuple[int, int, int]) -> list[int]:
    """The sum of the global ranks of this rank's group on each axis, by a real all-reduce."""
    import torch
    import torch.distributed as dist

    from megatron_lite.parallel.context import arrange, context_from_environment

    context = arrange(context_from_environment(), make(*grid).parallel)
    sums = []
    for axis in (context.pipe, context.replicas, context.tensor):
        value = torch.tensor(context.rank)
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
            assert dist.get_rank(axis.group) == axis.rank
        sums.append(int(value))
    return sums


def test_process_groups_follow_the_grid() -> None:
    assert run_ranks(sums_along_axes, 4, (2, 1, 2)) == [[2, 0, 1], [4, 1, 1], [2, 2, 5], [4, 3, 5]]
    assert run_ranks(sums_along_axes, 4, (1, 2, 2)) == [[0, 2, 1], [1, 4, 1], [2, 2, 5], [3, 4, 5]]


def test_the_summary_says_who_works_with_whom() -> None:
    text = summary(make(2, 1, 2))
    assert "tensor    2  ranks 0 1 | 2 3" in text
    assert "pipe      2  ranks 0 2 | 1 3" in text
    assert "data" not in text.split("layout")[1].split("output")[0]
    assert "ranks" not in summary(make(1, 2, 1)).split("layout")[1].split("\n")[1]


def test_the_batch_counts_data_ranks_only() -> None:
    config = make(2, 2, 2)
    assert config.parallel.data_parallel_size == 2
    assert config.batch.train_batch_size == 2


def test_the_summary_says_which_ranks_share_sequences() -> None:
    keys = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8, "data_path": "x"}
    degrees = {"context_parallel_size": 2, "model_parallel_size": 2}
    text = summary(config_from_keys(keys | degrees, world_size=8))
    assert "context by Ulysses" in text
    assert "context   2  ranks 0 2 | 1 3 | 4 6 | 5 7" in text
    assert "data      2  ranks 0 4 | 1 5 | 2 6 | 3 7" in text


def test_the_summary_says_what_each_rank_holds() -> None:
    keys = {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 2, "seq_length": 32}
    keys |= {"vocab_size": 1000, "intermediate_size": 256, "moe_num_experts": 4, "data_path": "x"}
    degrees = {"model_parallel_size": 4, "pipe_parallel_size": 2, "expert_parallel_size": 2}
    config = config_from_keys(keys | degrees | {"zero_stage": 1}, world_size=16)
    assert holdings(config) == [
        "2 of 8 heads, 1 of 2 key/value heads, 64 of 256 channels of the MLP, 256 of 1,024 tokens of the "
        "vocabulary",
        "3 of 6 layers",
        "2 of 4 experts of a layer",
        "1/2 of the optimizer's states",
    ]
    context = config_from_keys(keys | {"context_parallel_size": 2, "zero_stage": 3}, world_size=4)
    assert holdings(context) == [
        "16 of 32 tokens of a sequence",
        "1/4 of the optimizer's states and of the gradients and of the weights",
    ]
    assert "each rank 16 of 32 tokens" in summary(context)
    uneven = config_from_keys(keys | {"pipe_parallel_size": 4}, world_size=4)
    assert holdings(uneven)[0] == "about 1.5 of 6 layers"
    assert holdings(config_from_keys(keys, world_size=1)) == []


@pytest.mark.parametrize(("given", "ranks"), [({"precision": "bf16"}, 2), ({"pipe_parallel_size": 2}, 4)])
def test_the_summary_says_that_stage_0_runs_as_stage_1(given: dict[str, Any], ranks: int) -> None:
    keys = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8, "data_path": "x"}
    config = config_from_keys(keys | given, world_size=ranks)
    assert "ZeRO 0 (runs as 1)" in summary(config)
    assert "1/2 of the optimizer's states" in holdings(config)
    assert "(runs as" not in summary(config_from_keys(keys, world_size=ranks))
    assert "(runs as" not in summary(config_from_keys(keys | {"precision": "bf16"}))
