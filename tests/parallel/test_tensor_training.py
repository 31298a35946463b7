"""Whole runs on tensor ranks against one rank: losses, norms, final weights; checkpoints between layouts.

The grid (``grid.py``) has them with every other feature; here is what it has not: shared keys, offload, half
precision, checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from following import assert_follows, assert_same_weights, last_steps
from layout_runs import Case, Outcome, outcomes
from training.training_runs import losses, run, write_corpus
from transformers import AutoModelForCausalLM

from megatron_lite.checkpoint import read_weights
from megatron_lite.generation.load import load_model
from megatron_lite.hf import export_folder

SMALL: dict[str, Any] = {"num_layers": 2, "train_batch_size": 8}
SHARED_KEYS: dict[str, Any] = {
    "num_kv_heads": 1,
    "use_qk_layernorm": True,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "activation": "swiglu",
    "mlp_multiple_of": 8,
}
"""One key head for all ranks, two norms more, a head of its own, a parallel residual, a gated MLP."""

OFFLOAD: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}

Runs = dict[str, Outcome]


def case(name: str, size: int, stage: int = 0, split: bool = False, **options: Any) -> Case:
    keys = {"model_parallel_size": size, "sequence_parallel": split, "zero_optimization": {"stage": stage}}
    more = options.pop("keys", {})
    return Case(name, {**SMALL, **keys, **more}, samples=(8,), **options)


def resumed(name: str, source: str, size: int, stage: int, split: bool = False) -> Case:
    return case(name, size, stage, split, load=f"{source}/global_step10", first=10)


BY_RANKS = {
    1: [case("one", 1, saved_at=10), case("one-shared", 1, keys=SHARED_KEYS)],
    2: [
        case("tp2-zero1-sp", 2, 1, True, saved_at=10),
        case("tp2-bf16-sp", 2, 1, True, keys={"precision": "bf16"}),
        case("tp2-fp16", 2, keys={"precision": "fp16", "zero_optimization": {"stage": 2}}),
        case("tp2-offload2", 2, keys={"zero_optimization": OFFLOAD | {"stage": 2}}),
        case("tp2-offload3", 2, keys={"zero_optimization": OFFLOAD | {"stage": 3}}),
        resumed("one-to-tp2-zero2", "one", 2, 2),
    ],
    4: [
        case("tp2-dp2-zero3", 2, 3, saved_at=10),
        case("tp4-zero0-shared", 4, 0, keys=SHARED_KEYS),
        case("tp4-zero3-sp-shared", 4, 3, True, keys=SHARED_KEYS),
        resumed("one-to-tp4-zero1-sp", "one", 4, 1, True),
        resumed("tp2-to-tp4-zero3", "tp2-zero1-sp", 4, 3),
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    folder = tmp_path_factory.mktemp("runs")
    found: Runs = {}
    for ranks, cases in BY_RANKS.items():
        found |= zip([each.name for each in cases], outcomes(cases, ranks, folder), strict=True)
    back = [resumed("tp2-to-one", "tp2-zero1-sp", 1, 0), resumed("tp2-dp2-to-one", "tp2-dp2-zero3", 1, 2)]
    found |= zip([each.name for each in back], outcomes(back, 1, folder), strict=True)
    return folder, found


def reference_of(name: str) -> str:
    return "one-shared" if name.endswith("shared") else "one"


@pytest.mark.slow
def test_every_layout_follows_one_rank(runs: tuple[Path, Runs]) -> None:
    folder, found = runs
    assert found["one"].losses[-1] < found["one"].losses[0] - 0.5, "the reference learns"
    for name, outcome in found.items():
        if "16" in name:
            continue
        reference = reference_of(name)
        assert_follows(outcome, last_steps(found[reference], len(outcome.losses)), name)
        assert_same_weights(folder / name, folder / reference, floor=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2-bf16-sp", "tp2-fp16"])
def test_half_precision_stays_near_fp32(name: str, runs: tuple[Path, Runs]) -> None:
    _, found = runs
    assert found[name].losses == pytest.approx(found["one"].losses, rel=0.01)


@pytest.mark.slow
def test_the_same_checkpoint_whatever_the_layout(runs: tuple[Path, Runs]) -> None:
    """At step 10, tensor by tensor, optimizer state included, as another layout has put it back on disk."""
    folder, _ = runs
    for name in ("tp2-zero1-sp", "tp2-dp2-zero3"):
        weights = dict(read_weights(folder / name / "global_step10"))
        for key, expected in read_weights(folder / "one" / "global_step10"):
            assert torch.dist(weights[key], expected) <= 1e-4 * expected.norm() + 1e-7, (name, key)


@pytest.mark.slow
def test_a_whole_run_and_what_comes_of_it(tmp_path: Path) -> None:
    """``train`` with its hooks and a resume, with and without dropout; then generation and export."""
    corpus = write_corpus(tmp_path)
    keys: dict[str, Any] = {
        "train_iters": 6,
        "eval_interval": 3,
        "checkpoint_factor": 3,
        "hidden_dropout": 0.0,
    }
    split: dict[str, Any] = {"model_parallel_size": 2, "sequence_parallel": True}
    plain = run(tmp_path / "plain", corpus, 1, **keys)
    shared = run(tmp_path / "shared", corpus, 2, **keys, **split)
    for figure in ("train/loss", "train/grad_norm", "valid/loss"):
        expected = [record[figure] for record in plain if figure in record]
        assert [record[figure] for record in shared if figure in record] == pytest.approx(expected, rel=1e-5)

    keys |= {"hidden_dropout": 0.1, "attention_dropout": 0.1, "zero_optimization": {"stage": 1}}
    for name, sequence_parallel in (("copies", False), ("slices", True)):
        keys |= split | {"sequence_parallel": sequence_parallel}
        unbroken = run(tmp_path / name, corpus, 2, **keys)
        saved = {"load": str(tmp_path / name / "checkpoints"), "iteration": 3}
        assert losses(run(tmp_path / f"{name}-again", corpus, 2, **keys, **saved)) == losses(unbroken)[3:]

    names = ("plain", "shared")
    models = [load_model(tmp_path / name / "checkpoints", torch.device("cpu")).gpt for name in names]
    tokens = torch.arange(20)[None]
    export_folder(tmp_path / "shared/checkpoints", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(models[1](tokens), models[0](tokens), rtol=0, atol=1e-4)
        torch.testing.assert_close(theirs(tokens).logits, models[1](tokens), rtol=0, atol=2e-5)
