"""ZeRO++: hierarchical partitioning changes no figure; what a CPU cannot do is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training_runs import KEYS, losses, records, train_rank, write_corpus

from megatron_lite.config import config_from_keys
from megatron_lite.training.zero import check_zero
from megatron_lite.utils.errors import ConfigError

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "lr_decay_iters": 4, "eval_iters": 0}


def train_all(runs: list[dict[str, Any]]) -> list[int]:
    """One rank of runs after each other; who shares a second copy of the parameters with it in the last."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    assert [train_rank(keys, 4) for keys in runs] == [0] * len(runs)
    return dist.get_process_group_ranks(groups._get_zero_param_intra_parallel_group())


def test_hierarchical_partitions_follow_plain_stage_3(tmp_path: Path) -> None:
    # 1000: else all parameters of this small model stay gathered, and nothing is partitioned twice
    plain = {"stage": 3, "stage3_param_persistence_threshold": 1000}
    twice = plain | {"zero_hpz_partition_size": 2}

    def keys(name: str, zero: dict[str, Any], steps: int) -> dict[str, Any]:
        own = {"run_dir": str(tmp_path / name), "train_iters": steps, "zero_optimization": zero}
        return {**KEYS, **SHORT, **own, "data_path": str(corpus)}

    corpus = write_corpus(tmp_path)
    begun = [keys("plain", plain, 4), keys("hpz", twice, 2)]
    assert run_ranks(train_all, 4, begun) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    resumed = keys("resumed", twice, 4) | {"load": str(tmp_path / "hpz" / "checkpoints")}
    run_ranks(train_all, 4, [resumed])
    curves = {name: losses(records(tmp_path / name)) for name in ("plain", "hpz", "resumed")}
    assert len(curves["plain"]) == 4
    assert curves["plain"][-1] < curves["plain"][0]
    assert curves["hpz"] + curves["resumed"] == pytest.approx(curves["plain"], rel=1e-5)


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
        ({"stage": 3, "save_muon_momentum_buffer_in_memory": True}, "would lose the momentum"),
        ({"stage": 1, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size needs stage 3"),
    ],
)
def test_what_cannot_be_offloaded(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_keys({**KEYS, "data_path": "unused", "zero_optimization": zero})
