"""ZeRO++: hierarchical partitioning changes no figure; what a CPU cannot do is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training_runs import KEYS, losses, run, write_corpus

from megatron_lite.config import config_from_keys
from megatron_lite.training.zero import check_zero
from megatron_lite.utils.errors import ConfigError

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"train_iters": 6, "train_micro_batch_size_per_gpu": 2}


def gathered_between(keys: dict[str, Any]) -> list[int]:
    """Ranks that hold a second copy of the parameters between them, as DeepSpeed's engine has it."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.training.distributed import distributed
    from megatron_lite.training.run import open_engine

    config = config_from_keys(keys, world_size=4)
    context = context_from_environment()
    with distributed(context):
        open_engine(config, arrange(context, config.parallel))
    return dist.get_process_group_ranks(groups._get_zero_param_intra_parallel_group())


def test_hierarchical_partitions_follow_plain_stage_3(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    # 1000: else all parameters of this small model stay gathered, and nothing is partitioned twice
    stage3 = {"stage": 3, "stage3_param_persistence_threshold": 1000}
    plain = losses(run(tmp_path / "plain", corpus, 4, zero_optimization=stage3, **SHORT))
    twice = stage3 | {"zero_hpz_partition_size": 2}
    first = losses(run(tmp_path / "hpz", corpus, 4, zero_optimization=twice, **SHORT | {"train_iters": 3}))
    resumed = run(
        tmp_path / "resumed",
        corpus,
        4,
        zero_optimization=twice,
        load=str(tmp_path / "hpz" / "checkpoints"),
        lr_decay_iters=6,
        **SHORT,
    )
    assert len(plain) == 6
    assert plain[-1] < plain[0]
    assert first + losses(resumed) == pytest.approx(plain, rel=1e-5)


def test_the_groups_are_neighbours(tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    keys = {**KEYS, "data_path": "unused", "run_dir": str(tmp_path), "zero_optimization": zero}
    assert run_ranks(gathered_between, 4, keys) == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("ranks", "keys", "message"),
    [
        (1, {"zero_quantized_weights": True}, "zero_quantized_weights runs on a GPU only"),
        (1, {"zero_quantized_gradients": True}, "zero_quantized_gradients runs on a GPU only"),
        (4, {"zero_hpz_partition_size": 3}, "zero_hpz_partition_size 3 does not divide the 4 ranks"),
        (
            4,
            {"zero_hpz_partition_size": 2, "model_parallel_size": 2},
            "does not go with model_parallel_size 2",
        ),
    ],
)
def test_what_does_not_go(ranks: int, keys: dict[str, Any], message: str) -> None:
    layout = {"model_parallel_size": keys.pop("model_parallel_size", 1)}
    config = config_from_keys(
        {**KEYS, **layout, "data_path": "unused", "zero_optimization": {"stage": 3} | keys}, world_size=ranks
    )
    with pytest.raises(ConfigError, match=message):
        check_zero(config, CPU)


def test_a_gpu_may_quantise() -> None:
    zero = {"stage": 3, "zero_quantized_weights": True}
    check_zero(
        config_from_keys({**KEYS, "data_path": "unused", "zero_optimization": zero}), torch.device("cuda")
    )


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer needs nvme_path"),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}},
            "offload_optimizer.device nvme needs stage 3, but the stage is 2",
        ),
        ({"stage": 3, "offload_param": {"device": "disk"}}, "'disk'; it can be none, cpu or nvme"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "at the first learning rate"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow: its runs could not be saved"),
        ({"stage": 1, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size needs stage 3"),
    ],
)
def test_what_cannot_be_offloaded(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_keys({**KEYS, "data_path": "unused", "zero_optimization": zero})
