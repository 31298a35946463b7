"""The engine against a bare PyTorch loop: ZeRO stages, ranks, accumulation, masks, precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from training_runs import KEYS

from megatron_lite.config import Config, config_from_keys
from megatron_lite.data.batches import Batch
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory, spec_of

STEPS = 20
SAMPLES = 8
LR = 2e-3
Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def make_config(world_size: int = 1, **keys: Any) -> Config:
    return config_from_keys(
        {**KEYS, "data_path": "unused", "run_dir": "unused", **keys}, world_size=world_size
    )


def global_batch(step: int, masked: bool = False) -> Batch:
    """The step's samples: a walk through the tokens that can be learned, with noise."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 16, (SAMPLES, 1), generator=generator)
    noise = torch.randint(0, 3, (SAMPLES, 33), generator=generator)
    samples = (start + 7 * torch.arange(33) + noise) % 16
    mask = (torch.rand(SAMPLES, 32, generator=generator) < 0.4).float() if masked else None
    return Batch(samples[:, :-1], samples[:, 1:], mask)


def rows(batch: Batch, start: int, count: int) -> Batch:
    part = slice(start, start + count)
    return Batch(
        batch.tokens[part], batch.labels[part], None if batch.loss_mask is None else batch.loss_mask[part]
    )


def bare_curve(masked: bool = False, left_out: int | None = None, **keys: Any) -> Curve:
    """Plain PyTorch: the whole batch at once, textbook cross entropy, AdamW, clipping.

    The update of the step ``left_out`` is not made.
    """
    config = make_config(**keys)
    model = build_gpt(config, ParameterFactory(config.training.seed, torch.float32))
    matrices = [p for p in model.parameters() if spec_of(p).decays]
    others = [p for p in model.parameters() if not spec_of(p).decays]
    decay = config.optimizer.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=config.optimizer.betas, eps=config.optimizer.eps)
    curve = []
    for step in range(STEPS):
        batch = global_batch(step, masked)
        logits = model(batch.tokens).float().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
        weights = torch.ones_like(losses) if batch.loss_mask is None else batch.loss_mask.flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        if step == left_out:
            norm = torch.tensor(torch.inf)
        else:
            optimizer.step()
        curve.append((float(loss.detach()), float(norm)))
    return curve


def engine_rank(
    cases: list[dict[str, Any]], world_size: int, masked: bool, spoiled: int | None
) -> list[Curve]:
    return [engine_curve(keys, world_size, masked, spoiled) for keys in cases]


def engine_curve(keys: dict[str, Any], world_size: int, masked: bool, spoiled: int | None) -> Curve:
    """One rank's engine on its share of the same batches; the loss averaged over the ranks.

    The gradient of the step ``spoiled`` is not finite, though its loss is.
    """
    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.training.distributed import distributed
    from megatron_lite.training.objectives import OBJECTIVES, causal_lm
    from megatron_lite.training.run import open_engine

    def objective(*arguments: Any) -> torch.Tensor:
        losses = causal_lm(*arguments)
        return losses + (losses - losses.detach()).sqrt() if step == spoiled else losses

    config = make_config(world_size, **keys)
    context = context_from_environment()
    size = config.batch.train_micro_batch_size_per_gpu
    curve, skipped = [], []
    OBJECTIVES["causal_lm"] = objective
    with distributed(context):
        context = arrange(context, config.parallel)
        engine = open_engine(config, context)
        if (overlap := config.zero.block.get("overlap_comm")) is not None:
            assert engine.deepspeed.zero_overlap_comm() == overlap, "it is not what was asked for"
        for step in range(STEPS):
            batch = global_batch(step, masked)
            starts = range(context.data_rank * size, SAMPLES, size * context.data_size)
            result = engine.train_step([rows(batch, start, size) for start in starts], LR)
            loss = context.sum_over_replicas(result.loss.clone()) / context.data_size
            curve.append((float(loss), float(result.grad_norm)))
            skipped += [step] if result.skipped else []
        if spoiled is not None:
            counted = engine.deepspeed.global_steps, engine.deepspeed.skipped_steps
            assert (skipped, counted) == ([spoiled], (STEPS, 1))
    return curve


def engine_curves(
    cases: list[dict[str, Any]], world_size: int, masked: bool = False, spoiled: int | None = None
) -> list[Curve]:
    by_rank = run_ranks(engine_rank, world_size, cases, world_size, masked, spoiled)
    assert all(curves == by_rank[0] for curves in by_rank), "the ranks disagree"
    return by_rank[0]


def assert_same_curve(curve: Curve, reference: Curve, tolerance: float) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=20 * tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_follows_the_bare_loop(world_size: int) -> None:
    stages = [{"zero_optimization": {"stage": stage}} for stage in range(4)]
    reference = bare_curve()
    assert reference[-1][0] < reference[0][0] - 1, "the reference learns"
    for curve in engine_curves(stages, world_size):
        assert_same_curve(curve, reference, 1e-5)


def test_reducing_beside_the_backward_changes_nothing() -> None:
    """``overlap_comm``, in buckets that one backward fills several times."""
    overlapped = {"overlap_comm": True, "reduce_bucket_size": 5000}
    cases = [{"zero_optimization": {"stage": stage, **overlapped}} for stage in (1, 2, 3)]
    reference = bare_curve()
    for curve in engine_curves(cases, 2):
        assert_same_curve(curve, reference, 1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loss_is_the_mean_over_the_global_batchs_counted_tokens(world_size: int) -> None:
    """Masks leave each micro-batch another number of tokens: a mean of means would be another loss."""
    cases = [{"zero_optimization": {"stage": stage}} for stage in (0, 2)]
    for curve in engine_curves(cases, world_size, masked=True):
        assert_same_curve(curve, bare_curve(masked=True), 1e-5)


def test_accumulation_does_not_matter_nor_does_offloading() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases: list[dict[str, Any]] = [
        {"train_micro_batch_size_per_gpu": 8},
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 1} | offload},
        {"zero_optimization": {"stage": 2} | offload},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}} | offload},
    ]
    reference = bare_curve()
    for curve in engine_curves(cases, 1):
        assert_same_curve(curve, reference, 1e-5)


def test_without_clipping_the_norm_is_told_all_the_same() -> None:
    cases = [{"gradient_clipping": 0.0, "zero_optimization": {"stage": stage}} for stage in range(4)]
    config = make_config(gradient_clipping=0.0)
    assert config.optimizer.gradient_clipping == 0
    reference = bare_curve(gradient_clipping=1e9)
    for curve in engine_curves(cases, 2):
        assert_same_curve(curve, reference, 1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """At every stage, also in a pipeline: the curve of the bare loop that makes no update in that step."""
    cases: list[dict[str, Any]] = [{"zero_optimization": {"stage": stage}} for stage in (0, 2, 3)]
    cases.append({"pipe_parallel_size": 2})  # which is ZeRO 1
    reference = bare_curve(left_out=5)
    for curve in engine_curves(cases, 2, spoiled=5):
        assert_same_curve(curve, reference, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_offloaded_gradient_that_is_not_finite_spoils_one_step_only(precision: str) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases = [{"precision": precision, "zero_optimization": {"stage": stage} | offload} for stage in (1, 2, 3)]
    losses = [loss for loss, _ in bare_curve(left_out=5)]
    for curve in engine_curves(cases, 2, spoiled=5):
        assert [loss for loss, _ in curve] == pytest.approx(losses, rel=0.01)
        assert [step for step, (_, norm) in enumerate(curve) if norm == float("inf")] == [5]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(precision: str) -> None:
    """16-bit parameters with fp32 master weights: within a percent of fp32's losses at every stage."""
    cases = [{"precision": precision, "zero_optimization": {"stage": stage}} for stage in range(4)]
    reference = bare_curve()
    for curve in engine_curves(cases, 2):
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
            assert loss == pytest.approx(expected_loss, rel=0.01)
            assert norm == pytest.approx(expected_norm, rel=0.1)


def test_other_optimizers_follow_their_one_rank_curve_at_every_stage() -> None:
    """Element-wise optimizers do not notice ZeRO's flat slices; Muon gathers its matrices."""
    for name, tolerance in (("Lion", 1e-4), ("SGD", 1e-5), ("Muon", 1e-2)):
        optimizer = {"type": name, "params": {"lr": 2e-3}}
        cases = [{"optimizer": optimizer, "zero_optimization": {"stage": stage}} for stage in range(4)]
        reference, *others = engine_curves([{**case, "gradient_clipping": 0.0} for case in cases], 2)
        assert reference[-1][0] < reference[0][0] - 0.02
        for curve in others:
            assert [loss for loss, _ in curve] == pytest.approx(
                [loss for loss, _ in reference], rel=tolerance
            )
