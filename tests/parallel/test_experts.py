"""Runs whose experts are divided over ranks against one rank: losses, norms, final weights; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.stored import stored_scalars, stored_tensors
from following import assert_follows, assert_same_weights, last_steps
from layout_runs import KEYS, Case, Outcome, outcomes
from test_reshard import assert_same
from training.training_runs import run, write_corpus

from megatron_lite.checkpoint import verify
from megatron_lite.config import config_from_keys
from megatron_lite.config.summary import summary
from megatron_lite.generation.load import load_model
from megatron_lite.hf import export_folder
from megatron_lite.training.reshard import reshard
from megatron_lite.training.stages import check_experts
from megatron_lite.utils.errors import ConfigError

HALF, STEPS = 5, 10
EXPERTS: dict[str, Any] = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_loss_coeff": 1.0,  # half of the gradient's norm: a wrong scale shows
    "activation": "swiglu",
    "mlp_multiple_of": 8,
    "train_batch_size": 8,
}
SPLIT = {"sequence_parallel": True}
BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}
RECOMPUTE = {"checkpoint_activations": True}
IN_MEMORY = {"device": "cpu"}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": IN_MEMORY}}
STAGED_OFFLOAD = {"zero_optimization": {"stage": 1, "offload_optimizer": IN_MEMORY}}
OFFLOAD_ALL = {"zero_optimization": {"stage": 3, "offload_optimizer": IN_MEMORY, "offload_param": IN_MEMORY}}
TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2}

Runs = dict[str, Outcome]


def case(name: str, experts: int, stage: int = 0, tensor: int = 1, stages: int = 1, **options: Any) -> Case:
    keys = {
        "expert_parallel_size": experts,
        "zero_optimization": {"stage": stage},
        "model_parallel_size": tensor,
        "pipe_parallel_size": stages,
    }
    more = options.pop("keys", {})
    return Case(name, {**EXPERTS, **keys, **more}, samples=(8,), **{"last": STEPS, **options})


def resumed(name: str, source: str, *degrees: int, **options: Any) -> Case:
    return case(name, *degrees, load=f"{source}/global_step{HALF}", first=HALF, **options)


BY_RANKS = {
    1: [case("one", 1, saved_at=HALF)],
    2: [
        case("ep2-zero0", 2, 0, saved_at=HALF),
        case("ep2-zero1", 2, 1, keys={"train_micro_batch_size_per_gpu": 2} | RECOMPUTE),
        case("dp2-zero3", 1, 3, saved_at=HALF),
        case("ep2-offload", 2, keys=OFFLOAD),
        case("ep2-fp16", 2, 2, keys=FP16),
        resumed("one-to-ep2-zero2", "one", 2, 2),
        resumed("zero3-to-ep2-zero1", "dp2-zero3", 2, 1),
        resumed("ep2-to-tp2-sp", "ep2-zero0", 1, 0, 2, keys=SPLIT),
        resumed("ep2-to-pp2", "ep2-zero0", 1, 1, 1, 2),
    ],
    4: [
        case("dp2-ep2-tp2-zero0-sp", 2, 0, 2, keys=SPLIT),
        case("dp2-ep2-tp2-zero2", 2, 2, 2, saved_at=HALF),
        case("dp4-ep2-zero2", 2, 2),
        case("dp4-ep2-zero3", 2, 3, keys=OFFLOAD_ALL),
        case("dp4-ep4-zero1", 4, 1),
        case("pp2-ep2", 2, 1, 1, 2, keys=TWO_MICRO_BATCHES, saved_at=HALF),
        case("pp2-ep2-offload", 2, 1, 1, 2, keys=TWO_MICRO_BATCHES | STAGED_OFFLOAD),
        case("pp2-ep2-bf16", 2, 1, 1, 2, keys=BF16),
        case("pp2-ep2-fp16", 2, 1, 1, 2, keys=FP16),
        case("ep2-tp2-bf16", 2, 3, 2, keys=BF16),
        resumed("ep2-tp2-to-dp4-ep2-zero3", "dp2-ep2-tp2-zero2", 2, 3),
        resumed("pp2-ep2-to-ep2-tp2", "pp2-ep2", 2, 1, 2),
        resumed("same-ep4-zero1", "ep2-zero0", 4, 1, last=HALF),
        resumed("same-pp2-ep2", "same-ep4-zero1", 2, 1, 1, 2, last=HALF),
        resumed("same-ep2-zero3", "same-pp2-ep2", 2, 3, last=HALF),
        resumed("same-ep2-zero0", "same-ep2-zero3", 2, last=HALF),
    ],
}
BACK_ON_ONE = [
    resumed("ep2-tp2-to-one", "dp2-ep2-tp2-zero2", 1),
    resumed("pp2-ep2-to-one", "pp2-ep2", 1, 2),
    resumed("same-one", "same-ep2-zero0", 1, 1, last=HALF),
]
HALF_PRECISION = [each.name for cases in BY_RANKS.values() for each in cases if "16" in each.name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    folder = tmp_path_factory.mktemp("runs")
    found: Runs = {}
    for ranks, cases in (*BY_RANKS.items(), (1, BACK_ON_ONE)):
        found |= zip([each.name for each in cases], outcomes(cases, ranks, folder), strict=True)
    return folder, {name: outcome for name, outcome in found.items() if outcome.losses}


@pytest.mark.slow
def test_every_layout_follows_one_rank(runs: tuple[Path, Runs]) -> None:
    folder, found = runs
    reference = found["one"]
    assert reference.losses[-1] < reference.losses[0] - 0.15, "the reference learns"
    for name in found.keys() - set(HALF_PRECISION):
        assert_follows(found[name], last_steps(reference, len(found[name].losses)), name)
        assert_same_weights(folder / name, folder / "one", floor=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_half_precision_stays_near_fp32(name: str, runs: tuple[Path, Runs]) -> None:
    """In the gradient's norm, too: it tells experts counted twice, and fp16's scale left off the balance."""
    reference, outcome = runs[1]["one"], runs[1][name]
    assert outcome.losses == pytest.approx(reference.losses, rel=0.01)
    assert outcome.norms[:3] == pytest.approx(reference.norms[:3], rel=0.04)


@pytest.mark.slow
def test_the_same_state_in_every_layout(runs: tuple[Path, Runs]) -> None:
    """From a checkpoint of divided experts through other layouts: every tensor and number, bit by bit."""
    before, after = (runs[0] / name / f"global_step{HALF}" for name in ("ep2-zero0", "same-one"))
    expected, actual = stored_tensors(before), stored_tensors(after)
    assert expected.keys() == actual.keys()
    assert sum(kind == "exp_avg" and ".experts.3." in name for name, kind in expected) == 2 * 4
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())
    assert stored_scalars(before) == stored_scalars(after)


@pytest.mark.slow
def test_cut_offline_as_its_ranks_would(runs: tuple[Path, Runs], tmp_path: Path) -> None:
    source = runs[0] / "ep2-zero0" / f"global_step{HALF}"
    for name, words in (
        ("same-ep4-zero1", "world_size=4 expert_parallel_size=4 zero_optimization.stage=1"),
        ("same-pp2-ep2", "world_size=4 pipe_parallel_size=2 zero_optimization.stage=1"),
        ("same-ep2-zero3", "world_size=4 zero_optimization.stage=3"),
    ):
        found, _ = reshard(source, tmp_path / name, overrides=words.split())
        assert_same(found, runs[0] / name / f"global_step{HALF}")
        verify(found)


@pytest.mark.slow
def test_a_whole_run_and_what_comes_of_it(tmp_path: Path) -> None:
    """``train`` with its hooks, the last evaluation batch uneven; then generation and export."""
    corpus = write_corpus(tmp_path)
    keys: dict[str, Any] = {
        "train_iters": 6, "eval_interval": 3, "eval_iters": 1, "train_batch_size": 12,
        "hidden_dropout": 0.0, "moe_num_experts": 4, "moe_top_k": 2, "log_interval": 2,
    }  # fmt: skip
    divided = {**keys, "expert_parallel_size": 2, "zero_optimization": {"stage": 1}}
    plain = run(tmp_path / "plain", corpus, 1, **keys)
    shared = run(tmp_path / "shared", corpus, 2, **divided)
    for figure in ("train/loss", "train/grad_norm", "train/expert_load", "valid/loss"):
        expected = [record[figure] for record in plain if figure in record]
        assert [record[figure] for record in shared if figure in record] == pytest.approx(expected, rel=1e-5)
    load = [record["train/expert_load"] for record in plain if "train/expert_load" in record]
    assert all(1.0 < each < 4.0 for each in load)

    names = ("plain", "shared")
    models = [load_model(tmp_path / name / "checkpoints", torch.device("cpu")).gpt for name in names]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(models[1](tokens), models[0](tokens), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="cannot have moe_num_experts 4"):
        export_folder(tmp_path / "shared/checkpoints", tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"moe_num_experts": 1}, "expert_parallel_size 2 has no experts to divide"),
        ({"moe_num_experts": 5}, "does not divide the 5 experts"),
        ({"model_parallel_size": 4, "num_attention_heads": 4}, "does not divide the 1 data-parallel"),
        ({"moe_top_k": 5}, "moe_top_k 5 is more than moe_num_experts 4"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size 2 does"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "zero_quantized_gradients true",
        ),
        ({"zero_optimization": {"stage": 1, "reduce_scatter": False}}, "reduce_scatter false does not go"),
        ({"pipe_parallel_size": 2, "expert_interval": 3}, "and one of 2 layers may have none with"),
        ({"optimizer": {"type": "Muon"}}, "muon would take all experts of a layer for one matrix"),
    ],
    ids=str,
)
def test_what_does_not_go_with_experts_is_refused(keys: dict[str, Any], sentence: str) -> None:
    base = {**KEYS, "train_batch_size": 4, "moe_num_experts": 4, "expert_parallel_size": 2}
    with pytest.raises(ConfigError, match=sentence):
        config_from_keys({**base, **keys}, world_size=4)


def test_every_stage_needs_experts() -> None:
    kinds = ["experts", "dense", "experts", "dense"]
    check_experts(kinds, [0, 3, 7])
    with pytest.raises(ConfigError, match="stage 1 would have no layer with experts"):
        check_experts(kinds, [0, 4, 7])


def test_gpt_neox_s_name_and_the_summary() -> None:
    keys = {**KEYS, "train_batch_size": 8, "moe_num_experts": 4, "moe_top_k": 2}
    config = config_from_keys({**keys, "moe_expert_parallel_size": 2}, world_size=4)
    assert config.parallel.expert_parallel_size == 2
    text = summary(config, 12_000, active=7_000)
    assert "12k parameters (7k active): 4 layers" in text
    assert "4 experts (top 2) in 2 of the layers" in text
    assert "expert    2  ranks 0 1 | 2 3" in text
