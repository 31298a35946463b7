"""Offload to NVMe: the same curve as in memory, exact resumes, checkpoints to and from other places."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import COMPILES_AN_OPERATOR
from ranks import run_ranks
from small_run import start
from stored import stored_index, stored_scalars, stored_tensors
from test_async_save import Gate
from test_checkpoint_memory import growth

from megatron_lite.config import Config, config_from_keys
from megatron_lite.utils.errors import UserError

HALF, STEPS, SAMPLES = 3, 6, 4
KEYS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 384,  # a rank's half of an MLP's matrix is above 1 MB, below which nothing is swapped
    "num_attention_heads": 4,
    "seq_length": 16,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "checkpoint_activations": True,  # saves weights for the backward when the buffers have been used again
    "vocab_size": 257,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3}},
    "weight_decay": 0.1,
    "data_path": "unused",
}
COPIED = 8 << 20
"""Bytes: a third of what a rank saves."""

PLAIN: dict[str, Any] = {"zero_optimization": {"stage": 3}}

pytestmark = [
    pytest.mark.slow,
    COMPILES_AN_OPERATOR,
]


def nvme(folder: Path, ahead: bool) -> dict[str, Any]:
    """Parameters and optimizer in files below ``folder``, in several sub-groups, read ahead or not."""
    place = {"device": "nvme", "nvme_path": str(folder / "swap")}
    zero = {
        "stage": 3,
        "sub_group_size": 400_000,
        "offload_optimizer": place | {"pipeline_read": ahead, "pipeline_write": ahead},
        "offload_param": place | {"max_in_cpu": 0},
    }
    return {"zero_optimization": zero}


def make_engine(config: Config, context: Any) -> Any:
    from megatron_lite.model import build_gpt
    from megatron_lite.parallel.parameter import ParameterFactory
    from megatron_lite.training.engine import Engine
    from megatron_lite.training.objectives import OBJECTIVES

    return Engine(
        config,
        context,
        lambda dtype: build_gpt(config, ParameterFactory(config.training.seed, dtype)),
        OBJECTIVES["causal_lm"],
    )


def train(engine: Any, context: Any, first: int, last: int) -> list[tuple[float, float]]:
    """(global loss, gradient norm) of steps ``first + 1`` to ``last``; a step's data depend on it only."""
    from megatron_lite.data.batches import Batch

    share = SAMPLES // context.world_size
    curve = []
    for step in range(first, last):
        samples = torch.randint(0, 97, (SAMPLES, 17), generator=torch.Generator().manual_seed(step))
        mine = samples[context.rank * share : (context.rank + 1) * share]
        result = engine.train_step([Batch(mine[:, :-1], mine[:, 1:], None)], 2e-3)
        loss = result.loss.clone()
        if context.world_size > 1:
            torch.distributed.all_reduce(loss)
        curve.append((float(loss) / context.world_size, float(result.grad_norm)))
    return curve


def follow(folder: Path, plan: list[dict[str, Any]], world_size: int) -> list[Any]:
    """Each entry of ``plan`` as an engine: ``load`` it, save ``at_once``, train, ``save`` on the way.

    ``beside``: also save while the training goes on, held back until it has ended.
    """
    from megatron_lite.checkpoint import load_checkpoint, save_checkpoint
    from megatron_lite.checkpoint.background import BackgroundSaver
    from megatron_lite.parallel.context import arrange
    from megatron_lite.training.zero import swap_space

    context = start()
    outcome: list[Any] = []
    for entry in plan:
        keys = {**KEYS, **entry["keys"], "run_dir": str(folder / "run")}
        micro = {"train_micro_batch_size_per_gpu": SAMPLES // world_size}
        config = config_from_keys(keys | micro, world_size=world_size)
        context = arrange(context, config.parallel)

        with swap_space(config, context):
            engine = make_engine(config, context)
            first = 0
            if "load" in entry:
                load_checkpoint(folder / entry["load"], engine.deepspeed, context)
                first = HALF
            if "at_once" in entry:
                save_checkpoint(folder / entry["at_once"], first, engine.deepspeed, {}, {}, context)
            curve = [] if first else train(engine, context, 0, HALF)
            if "save" in entry:
                save_checkpoint(folder / entry["save"], HALF, engine.deepspeed, {}, {}, context)
            if "beside" in entry:
                gate, saver = Gate(), BackgroundSaver(context)
                to = (folder / entry["beside"], HALF, engine.deepspeed, {}, {})
                assert growth(partial(saver.start, *to)) < COPIED, "the state was copied to memory"
            curve += train(engine, context, HALF, STEPS)
            if "beside" in entry:
                gate.open()
                saver.wait()
                saver.close()
            if "last" in entry:
                save_checkpoint(folder / entry["last"], STEPS, engine.deepspeed, {}, {}, context)
            swapped = len(list((folder / "swap").rglob("*.swp"))) if (folder / "swap").exists() else 0
            outcome.append((curve, swapped))
            context.barrier()
        context.barrier()
        assert not list((folder / "swap").rglob("*.swp")), "swap files are left"
    return outcome


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Every tensor and number, bit by bit."""
    expected, actual = stored_tensors(first), stored_tensors(second)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), key
    assert stored_scalars(first) == stored_scalars(second)
    assert stored_index(first)["engine"] == stored_index(second)["engine"]


def near(curve: list[tuple[float, float]], reference: list[tuple[float, float]]) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_curve_and_checkpoints(tmp_path: Path) -> None:
    swapping = nvme(tmp_path, ahead=True)
    begun = [
        {"keys": PLAIN, "save": "plain"},
        {"keys": swapping, "save": "nvme", "beside": "beside", "last": "unbroken"},
    ]
    (plain, none), (swapped, files) = run_ranks(follow, 2, tmp_path, begun, 2)[0]
    assert plain[-1][0] < plain[0][0] - 0.3, "the reference learns"
    near(swapped, plain)
    # of 2 ranks: at least 3 sub-groups' weights, moments and gradients, and 4 parameters
    assert none == 0
    assert files >= 2 * (3 * 4 + 4)

    resumed = [
        {"keys": swapping, "load": "nvme", "at_once": "nvme-nvme", "last": "resumed"},
        {"keys": nvme(tmp_path, ahead=False), "load": "plain", "at_once": "plain-nvme"},
    ]
    (again, _), (from_plain, _) = run_ranks(follow, 2, tmp_path, resumed, 2)[0]
    assert again == swapped[HALF:], "resumed bit by bit"
    near(from_plain, plain[HALF:])
    half, last = f"global_step{HALF}", f"global_step{STEPS}"
    for expected, actual in (
        (f"nvme/{half}", f"nvme-nvme/{half}"),
        (f"plain/{half}", f"plain-nvme/{half}"),
        (f"nvme/{half}", f"beside/{half}"),
        (f"unbroken/{last}", f"resumed/{last}"),
    ):
        assert_same_checkpoint(tmp_path / expected, tmp_path / actual)

    one_rank = [
        {"keys": {"zero_optimization": {"stage": 1}}, "load": "nvme", "at_once": "nvme-one"},
        {"keys": swapping, "load": "plain"},
    ]
    for curve, _ in run_ranks(follow, 1, tmp_path, one_rank, 1)[0]:
        near(curve, swapped[HALF:])
    assert_same_checkpoint(tmp_path / "nvme" / half, tmp_path / "nvme-one" / half)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """Said before anything is built. /proc can be written to by nobody."""
    from megatron_lite.parallel.context import context_from_environment
    from megatron_lite.training.zero import swap_space

    place = {"device": "nvme", "nvme_path": "/proc/swap"}
    config = config_from_keys(
        {**KEYS, "run_dir": str(tmp_path), "zero_optimization": {"stage": 3, "offload_optimizer": place}}
    )
    with (
        pytest.raises(UserError, match="nvme_path /proc/swap cannot be used"),
        swap_space(config, context_from_environment()),
    ):
        pass
