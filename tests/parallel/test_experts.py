"""Runs whose experts are divided over ranks against one rank: losses, norms, final weights; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import Case, Outcome, outcomes

from megatron_lite.checkpoint import read_weights

EXPERTS: dict[str, Any] = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "expert_interval": 2,
    "activation": "swiglu",
    "mlp_multiple_of": 8,
    "num_layers": 4,
    "train_batch_size": 8,
}
Runs = dict[str, Outcome]


def case(name: str, experts: int, stage: int = 0, tensor: int = 1, stages: int = 1, **options: Any) -> Case:
    keys = {
        "expert_parallel_size": experts,
        "zero_optimization": {"stage": stage},
        "model_parallel_size": tensor,
        "pipe_parallel_size": stages,
    }
    more = options.pop("keys", {})
    return Case(name, {**EXPERTS, **keys, **more}, samples=(8,), **options)


def resumed(name: str, source: str, *degrees: int, **options: Any) -> Case:
    return case(name, *degrees, load=f"{source}/global_step10", first=10, **options)


SPLIT = {"sequence_parallel": True}
BF16 = {"precision": "bf16"}
FP16 = {"precision": "fp16"}
RECOMPUTE = {"checkpoint_activations": True}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}

BY_RANKS = {
    1: [case("one", 1, saved_at=10)],
    2: [
        case("ep2-zero0", 2, 0, saved_at=10),
        case("ep2-zero1", 2, 1, keys=RECOMPUTE),
        case("ep2-zero2", 2, 2, keys={"train_micro_batch_size_per_gpu": 2}, saved_at=10),
        case("dp2-zero3", 1, 3),
        case("tp2-sp", 1, 0, 2, keys=SPLIT),
        case("pp2", 1, 0, 1, 2),
        case("ep2-bf16", 2, 1, keys=BF16),
        case("ep2-fp16", 2, 2, keys=FP16),
        case("ep2-offload", 2, keys=OFFLOAD),
    ],
    4: [
        case("dp2-ep2-tp2-zero0-sp", 2, 0, 2, keys=SPLIT),
        case("dp2-ep2-tp2-zero1", 2, 1, 2, saved_at=10),
        case("dp4-ep2-zero0", 2, 0),
        case("dp4-ep2-zero2", 2, 2),
        case("dp4-ep4-zero1", 4, 1, saved_at=10),
        case("pp2-ep2", 2, 1, 1, 2, saved_at=10, keys={"gradient_accumulation_steps": 2}),
        case("pp2-ep2-bf16", 2, 1, 1, 2, keys=BF16),
        case("pp2-ep2-fp16", 2, 1, 1, 2, keys=FP16),
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    folder = tmp_path_factory.mktemp("runs")
    found: Runs = {}
    for ranks, cases in BY_RANKS.items():
        found |= zip([each.name for each in cases], outcomes(cases, ranks, folder, 300), strict=True)
    return folder, found


def test_every_layout_follows_one_rank(runs: tuple[Path, Runs]) -> None:
    folder, found = runs
    ref = found["one"]
    expected = dict(read_weights(folder / "one"))
    import numpy as np
    for name, o in found.items():
        r = lambda a, b: float(np.abs(np.array(a) / np.array(b)[-len(a):] - 1).max())
        w = dict(read_weights(folder / name))
        assert w.keys() == expected.keys()
        worst = max((float(torch.dist(w[k], expected[k]) / (expected[k].norm() + 1e-9)), k) for k in w)
        print(name, "loss %.1e norm %.1e eval %.1e" % (r(o.losses, ref.losses), r(o.norms, ref.norms), o.eval_loss / ref.eval_loss - 1), worst)
    print(ref.losses[0], ref.losses[-1], ref.norms[:3])
