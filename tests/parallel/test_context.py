"""Context ranks follow one rank, by Ulysses and by the ring, with documents, windows and shared key heads.

The grid (``grid.py``) has them in every layout without those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from following import assert_follows, assert_same_weights
from layout_runs import KEYS, Case, Outcome, outcomes

from megatron_lite.config import config_from_keys
from megatron_lite.planner.traffic import step_traffic

STEPS = 10
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
PLAIN: dict[str, Any] = {
    "num_layers": 2,
    "train_batch_size": 8,
    "rope_scaling": YARN,
    "use_bias_in_qkv": False,  # a key's bias has nearly no gradient but rounding
}
RICH: dict[str, Any] = {
    **PLAIN,
    "rope_scaling": None,
    "pos_emb": "learned",
    "opt_pos_emb_offset": 2,
    "attention_scale": 0.5,
    "norm": "non_parametric_layernorm",
    "kv_channels": 12,
    "num_kv_heads": 2,
    "attention_config": [[["global", "local"], "all"]],
    "sliding_window_width": 5,
    "reset_attention_mask": True,
    "reset_position_ids": True,
}
"""Shared key heads, one layer with a window, documents that see nothing of each other and count from 0."""

BOTH: dict[str, Any] = {**RICH, "mlm_training": True, "mlm_mask_id": 0}
"""The same with attention in both directions."""

SPLIT: dict[str, Any] = {"model_parallel_size": 2, "sequence_parallel": True}
STAGES: dict[str, Any] = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4}
RECOMPUTE = {"checkpoint_activations": True}

Runs = dict[str, Outcome]


def case(name: str, size: int, kind: str, stage: int = 0, **keys: Any) -> Case:
    """A case whose name ends in the name of what it follows."""
    shape = {"plain": PLAIN, "rich": RICH, "both": BOTH}[name.rpartition("-")[2]]
    rich = shape is not PLAIN
    own = {
        "context_parallel_size": size,
        "context_parallel_kind": kind,
        "zero_optimization": {"stage": stage},
    }
    return Case(name, {**shape, **own, **keys}, masked=rich, samples=(8,), last=STEPS, documents=rich)


def counted(name: str, size: int, kind: str, **keys: Any) -> Case:
    """A case of one step whose traffic is counted."""
    own = {"context_parallel_size": size, "context_parallel_kind": kind, "num_kv_heads": 1}
    return Case(name, {**PLAIN, **own, **keys}, samples=(8,), last=2, counted=True)


BY_RANKS = {
    1: [case("plain", 1, "auto"), case("rich", 1, "auto"), case("both", 1, "auto")],
    2: [
        case("r2-zero1-rich", 2, "ring", 1),
        case("u2-zero2-rich", 2, "ulysses", 2),
        case("r2-zero3-plain", 2, "ring", 3, **RECOMPUTE),
        case("u2-bf16-rich", 2, "ulysses", 1, precision="bf16"),
        case("r2-fp16-rich", 2, "ring", 2, precision="fp16"),
        case("r2-zero2-both", 2, "ring", 2),
        case("u2-zero1-both", 2, "ulysses", 1),
        counted("u2-counted", 2, "ulysses"),
        counted("r2-counted-both", 2, "ring", mlm_training=True, mlm_mask_id=0, sliding_window_width=6),
        counted("r2-counted", 2, "ring", sliding_window_width=6, **RECOMPUTE),
    ],
    4: [
        case("u2-tp2-rich", 2, "ulysses", 1, **SPLIT),
        case("r2-tp2-rich", 2, "ring", 3, **SPLIT),
        case("u2-pp2-rich", 2, "ulysses", 0, **STAGES),
        case("r2-pp2-rich", 2, "ring", 1, **STAGES, **RECOMPUTE),
        case("u2-dp2-rich", 2, "ulysses", 3),
        case("u4-rich", 4, "ulysses", 2),
        case("r4-plain", 4, "ring"),
        case("r4-rich", 4, "ring", 1),
        case("r2-tp2-both", 2, "ring", 1, **SPLIT),
        case("u2-pp2-both", 2, "ulysses", 1, **STAGES, **RECOMPUTE),
        counted("r4-counted", 4, "ring", sliding_window_width=4),
        counted("r4-counted-both", 4, "ring", mlm_training=True, mlm_mask_id=0),
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    folder = tmp_path_factory.mktemp("runs")
    found: Runs = {}
    for ranks, cases in BY_RANKS.items():
        found |= zip([each.name for each in cases], outcomes(cases, ranks, folder), strict=True)
    return folder, found


@pytest.mark.slow
def test_every_layout_follows_one_rank(runs: tuple[Path, Runs]) -> None:
    folder, found = runs
    assert found["rich"].losses[-1] < found["rich"].losses[0] - 0.1, "the reference learns"
    for name, outcome in found.items():
        if "16" in name or "counted" in name:
            continue
        reference = name.rpartition("-")[2]
        assert_follows(outcome, found[reference], name)
        assert_same_weights(folder / name, folder / reference, floor=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["u2-bf16-rich", "r2-fp16-rich"])
def test_half_precision_stays_near_fp32(name: str, runs: tuple[Path, Runs]) -> None:
    _, found = runs
    assert found[name].losses == pytest.approx(found["rich"].losses, rel=0.01)


@pytest.mark.slow
def test_what_context_ranks_send_is_the_formula(runs: tuple[Path, Runs]) -> None:
    """With one key head, which Ulysses copies; with windows, for which a ring sends less."""
    _, found = runs
    for ranks, cases in BY_RANKS.items():
        for each in cases:
            if each.counted:
                config = config_from_keys({**KEYS, **each.keys}, world_size=ranks)
                formula = step_traffic(config, config.batch.gradient_accumulation_steps)
                sent = found[each.name].traffic
                assert sent["context"] == pytest.approx(formula["context"], rel=1e-9), each.name
                assert sent["data"] == pytest.approx(formula["data"], rel=1e-9), each.name
