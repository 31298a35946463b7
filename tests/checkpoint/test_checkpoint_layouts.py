"""Saved under one ZeRO stage and number of ranks, resumed under another: same tensors, same losses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_run import Run, make_engine, save, start, train
from stored import stored_index, stored_scalars, stored_tensors

from megatron_lite.checkpoint import load_checkpoint, read_config, read_weights
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.utils.log import LOGGER

HALF, STEPS = 5, 10
STAGES = [Run(stage) for stage in range(4)]


def save_at_half(folder: Path, runs: list[Run]) -> dict[str, list[float]]:
    """Saves each run at HALF, goes on to STEPS; the losses."""
    context = start()
    losses = {}
    for run in runs:
        engine = make_engine(run)
        losses[str(run)] = train(engine, 0, HALF)
        save(run, engine, context, folder / "first", HALF)
        losses[str(run)] += train(engine, HALF, STEPS)
        engine.destroy()
    return losses


def resume_as(folder: Path, pairs: list[tuple[Run, Run]]) -> tuple[list[list[float]], list[str]]:
    """Loads each first run as the second, saves it at once, goes on; the losses, and what was logged."""
    context = start()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    losses = []
    for source, target in pairs:
        engine = make_engine(target)
        load_checkpoint(folder / "first" / str(source), engine, context)
        assert_parameters_are_rounded_weights(engine, folder / "first" / str(source))
        save(target, engine, context, folder / str(source) / f"on{context.world_size}", HALF)
        losses.append(train(engine, HALF, STEPS))
        engine.destroy()
    return losses, messages


def assert_parameters_are_rounded_weights(engine: Any, checkpoint: Path) -> None:
    """What the model computes with is what the file has, rounded to the parameters' dtype."""
    import deepspeed

    weights = dict(read_weights(checkpoint))
    for p in engine.module.parameters():
        with deepspeed.zero.GatheredParameters(p, enabled=hasattr(p, "ds_id")):
            assert torch.equal(p.data, weights[spec_of(p).name].to(p.dtype)), spec_of(p).name


def assert_same_state(folder: Path, source: Run, target: Run, ranks: int) -> None:
    """Every tensor and number that was saved comes back out of the other layout bit by bit."""
    before = folder / "first" / str(source) / f"global_step{HALF}"
    after = folder / str(source) / f"on{ranks}" / str(target) / f"global_step{HALF}"
    expected, actual = stored_tensors(before), stored_tensors(after)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), f"{key} of {source} as {target} on {ranks}"
    assert stored_scalars(before) == stored_scalars(after)
    for key in ("engine", "loss_scaler", "trainer_state", "config"):
        assert stored_index(before)[key] == stored_index(after)[key]


@pytest.mark.slow
def test_any_stage_and_number_of_ranks(tmp_path: Path) -> None:
    unbroken = run_ranks(save_at_half, 2, tmp_path, STAGES)[0]
    every_pair = [(source, target) for source in STAGES for target in STAGES]
    next_stage = list(zip(STAGES, STAGES[1:] + STAGES[:1], strict=True))
    for ranks, pairs in ((3, every_pair), (1, next_stage)):
        losses, messages = run_ranks(resume_as, ranks, tmp_path, pairs)[0]
        for (source, target), resumed in zip(pairs, losses, strict=True):
            assert_same_state(tmp_path, source, target, ranks)
            assert resumed == pytest.approx(unbroken[str(source)][HALF:], rel=1e-5), f"{source} as {target}"
        assert f"has no random generators for {ranks} ranks: they start anew" in messages[0]


@pytest.mark.slow
def test_low_precision_keeps_its_fp32_weights(tmp_path: Path) -> None:
    """bf16 and fp16: the fp32 weights, optimizer state and loss scale move as they are."""
    bf16 = [Run(0, "bf16"), Run(1, "bf16", grad_accum_dtype="fp32"), Run(2, "bf16"), Run(3, "bf16")]
    fp16 = [Run(stage, "fp16") for stage in (2, 1, 3)]  # stage 0 has a loss scaler of fewer parts
    muon = [Run(2, "bf16", "muon"), Run(1, "bf16", "muon", grad_accum_dtype="fp32")]
    pairs = [
        (a, b) for family in (bf16, fp16, muon) for a, b in zip(family, family[1:] + family[:1], strict=True)
    ]
    pairs += [(bf16[1], Run(3)), (Run(0), Run(2, "bf16")), (bf16[3], Run(1, "bf16", offload=True))]
    run_ranks(save_at_half, 3, tmp_path, sorted({a for a, _ in pairs}, key=str))
    losses, _ = run_ranks(resume_as, 2, tmp_path, pairs)[0]
    for (source, target), resumed in zip(pairs, losses, strict=True):
        if "muon" not in str(source):  # its momentum has the gradients' dtype
            assert_same_state(tmp_path, source, target, 2)
        assert all(loss < 3.0 for loss in resumed), f"{source} as {target}: {resumed}"


def digest(tensor: torch.Tensor) -> float:
    return float((tensor.double() * torch.arange(1, tensor.numel() + 1).view(tensor.shape)).sum())


def gathered_weights(folder: Path) -> dict[str, float]:
    """The weights of a ZeRO 3 run as DeepSpeed puts them together."""
    from deepspeed.utils import safe_get_full_fp32_param

    context = start()
    run = Run(3, "bf16")
    engine = make_engine(run)
    train(engine, 0, 2)
    save(run, engine, context, folder, 2)
    return {spec_of(p).name: digest(safe_get_full_fp32_param(p)) for p in engine.module.parameters()}


def test_weights_without_an_engine(tmp_path: Path) -> None:
    expected = run_ranks(gathered_weights, 3, tmp_path)[0]
    folder = tmp_path / str(Run(3, "bf16"))
    weights = dict(read_weights(folder))
    assert {name: digest(weight) for name, weight in weights.items()} == expected
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert read_config(folder / "global_step2") == {"hidden_size": 10, "train-iters": 20}
    for file in folder.glob("*/optimizer_*"):
        file.unlink()  # the weights stand alone
    assert len(dict(read_weights(folder))) == len(expected)
