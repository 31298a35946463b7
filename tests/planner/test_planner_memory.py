"""The memory estimate: ZeRO's published table, its own laws, and the memory that real runs take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config import Config, config_from_keys, load_config
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.planner import (
    Gpu,
    Machine,
    MemoryEstimate,
    count_parameters,
    estimate_memory,
    fits,
    parameters_by_place,
    suggest_fitting_keys,
)

ROOT = Path(__file__).resolve().parents[2]
KEYS: dict[str, Any] = {
    "num_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 1024,
    "pos_emb": "rotary",
    "vocab_size": 50257,
    "train_micro_batch_size_per_gpu": 8,
    "precision": "bf16",
}


def config(ranks: int = 1, **keys: Any) -> Config:
    return config_from_keys({**KEYS, **keys}, world_size=ranks)


def states(ranks: int, stage: int, **keys: Any) -> MemoryEstimate:
    return estimate_memory(config(ranks, zero_optimization={"stage": stage, **keys}), on_gpu=True)


def test_divided_experts() -> None:
    """Over 4 of 8 ranks: a quarter of the experts each, whose optimizer state only two ranks share."""
    keys = {"moe_num_experts": 8, "moe_top_k": 2, "zero_optimization": {"stage": 1}}
    whole, divided = (
        estimate_memory(config(8, expert_parallel_size=degree, **keys), on_gpu=True) for degree in (1, 4)
    )
    count = parameters_by_place(config(8, **keys))
    assert count.in_experts > count.total / 2
    saved = whole.device["parameters"] - divided.device["parameters"]
    assert saved == pytest.approx(2 * count.in_experts * 3 / 4)
    assert divided.device["optimizer"] == pytest.approx(whole.device["optimizer"], rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    # Rajbhandari et al. 2020, figure 1: bytes a parameter, 2, 2 and 12 in all; gradients here in fp32.
    [(1, 2.0, 4.0, 12 / 64), (2, 2.0, 4 / 64, 12 / 64), (3, 2 / 64, 4 / 64, 12 / 64)],
)
def test_zero_paper(stage: int, parameters: float, gradients: float, optimizer: float) -> None:
    count = count_parameters(config(64))
    device = states(64, stage).device
    for part, per_parameter in (
        ("parameters", parameters),
        ("gradients", gradients),
        ("optimizer", optimizer),
    ):
        assert device[part] / count == pytest.approx(per_parameter, rel=1e-3)


def test_every_stage_needs_less_of_the_states() -> None:
    needs = [
        sum(states(8, stage).device[part] for part in ("parameters", "gradients", "optimizer"))
        for stage in range(1, 4)
    ]
    assert needs == sorted(needs, reverse=True)


def test_stage_0_needs_what_the_stage_needs_that_it_runs_as() -> None:
    """DeepSpeed runs it as stage 1 in 16 bits and with pipeline stages: an fp32 copy of fp32 weights, too."""
    for keys, as_stage_1 in (({}, False), ({"pipe_parallel_size": 2}, True), ({"precision": "bf16"}, True)):
        zero, one = (
            estimate_memory(config(4, **{"precision": "fp32", "zero_optimization.stage": stage} | keys))
            for stage in (0, 1)
        )
        assert (zero == one) == as_stage_1


def test_offload_moves_the_optimizer_to_main_memory() -> None:
    kept, moved = states(8, 2), states(8, 2, offload_optimizer={"device": "cpu"})
    assert "optimizer" not in moved.device
    assert moved.host["optimizer"] == kept.device["optimizer"]
    nvme = {"device": "nvme", "nvme_path": "swap"}
    on_disk = states(8, 3, offload_optimizer=nvme, offload_param=nvme | {"max_in_cpu": 0})
    assert not {"optimizer", "parameters"} & {*on_disk.host, *on_disk.device}
    share = count_parameters(config(8)) / 8
    assert on_disk.disk_total == pytest.approx(18 * share, rel=1e-3)  # fp32 weights, moments, gradients; bf16
    assert kept.disk == moved.disk == {}


def test_a_save_beside_the_training_copies_a_share() -> None:
    """fp32 weights and Adam's moments: in main memory, on NVMe where they are there."""
    nvme = {"device": "nvme", "nvme_path": "swap"}
    for keys, place in (({}, "host"), ({"offload_optimizer": nvme}, "disk")):
        block = {"stage": 3, **keys}
        waiting, beside = (
            estimate_memory(config(8, zero_optimization=block, async_save=async_save), on_gpu=True)
            for async_save in (False, True)
        )
        assert beside.device == waiting.device
        copy = getattr(beside, f"{place}_total") - getattr(waiting, f"{place}_total")
        assert copy == pytest.approx(12 * count_parameters(config(8)) / 8, rel=1e-6)
        assert (beside.host_total == waiting.host_total) == (place == "disk")


def test_activation_checkpointing_keeps_inputs_only() -> None:
    whole = estimate_memory(config()).device["activations"]
    recomputed = estimate_memory(config(checkpoint_activations=True)).device["activations"]
    tokens, layers, hidden = 8 * 1024, 24, 1024
    assert tokens * layers * hidden * 2 < recomputed < whole / 8


def test_suggestions_fit_and_leave_the_global_batch_alone() -> None:
    run = config(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=2)
    machine = Machine(cores=2, memory_total=12 << 30, memory_available=12 << 30)
    assert not fits(estimate_memory(run), machine, 1)
    suggestions = suggest_fitting_keys(run, machine, 1)
    assert suggestions
    for suggestion in suggestions:
        changed = run.with_keys(**suggestion.keys)
        assert fits(estimate_memory(changed), machine, 1)
        assert changed.batch.train_batch_size == run.batch.train_batch_size
    assert suggestions[0].keys == {"checkpoint_activations": True}
    assert str(suggestions[0]) == "--set checkpoint_activations=true"
    # ZeRO shares among ranks, offload takes load off GPUs: neither helps one rank on a CPU.
    assert not any(key.startswith("zero") for suggestion in suggestions for key in suggestion.keys)


def test_a_combination_when_no_single_key_is_enough() -> None:
    gpus = (Gpu("small", 6 << 30, 6 << 30),) * 4
    machine = Machine(cores=16, memory_total=256 << 30, memory_available=256 << 30, gpus=gpus)
    run = config(4, zero_optimization={"stage": 0, "reduce_bucket_size": 5e7}, num_layers=48)
    (suggestion,) = suggest_fitting_keys(run, machine, 4)
    batch = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}  # these change together
    changes = [{key} for key in suggestion.keys if key not in batch]
    changes += [batch] if batch <= set(suggestion.keys) else []
    assert len(changes) > 1
    for change in changes:  # nothing is there that is not needed
        without = {name: value for name, value in suggestion.keys.items() if name not in change}
        assert not fits(estimate_memory(run.with_keys(**without), on_gpu=True), machine, 4)


def test_nothing_helps_a_model_that_is_too_large() -> None:
    machine = Machine(cores=2, memory_total=1 << 30, memory_available=1 << 30)
    assert suggest_fitting_keys(config(), machine, 1) == []


SMALL = {
    "seq_length": 128,
    "train_iters": 3,
    "eval_iters": 0,
    "log_interval": 1,
    "tokenizer_type": "ByteTokenizer",
}
OFFLOADED = {
    "zero_optimization.stage": 3,
    "zero_optimization.offload_optimizer": "{device: cpu}",
    "zero_optimization.offload_param": "{device: cpu}",
}
MEASURED = [
    # mostly model states; mostly activations; shared parameters; fp32 copies; the same, offloaded; experts
    (1, {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12}),
    (
        1,
        {
            "num_layers": 16,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "train_micro_batch_size_per_gpu": 16,
        },
    ),
    (2, {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "zero_optimization.stage": 3}),
    (1, {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "precision": "bf16"}),
    (1, {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "precision": "bf16"} | OFFLOADED),
    (
        2,
        {
            "num_layers": 4,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "moe_num_experts": 16,
            "moe_top_k": 2,
            "expert_interval": 1,
            "expert_parallel_size": 2,
            "zero_optimization.stage": 1,
        },
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "keys"), MEASURED)
def test_estimate_against_a_real_run(ranks: int, keys: dict[str, Any], tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        for _ in range(200):
            writer.add([*range(256), 256])
    given = {**SMALL, "data_path": str(tmp_path / "corpus"), "num_gpus": ranks, **keys}
    (tmp_path / "run.yml").write_text("vocab_size: 257")
    words = [f"{key}={value}" for key, value in given.items()]
    estimate = estimate_memory(load_config([tmp_path / "run.yml"], words, world_size=ranks))
    peak = peak_memory(tmp_path, given)
    assert 0.8 < peak / (estimate.device_total + estimate.host_total) < 1.25


def peak_memory(folder: Path, keys: dict[str, Any]) -> int:
    """Peak resident bytes of the largest rank of a run of ``keys`` (ru_maxrss of the launcher's children)."""
    (folder / "run.yml").write_text("{}")
    words = [f"{key}={value}" for key, value in {**keys, "run_dir": folder / "run"}.items()]
    command = [sys.executable, "deepy.py", "train.py", str(folder / "run.yml"), "--set", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (folder / "log").read_text()
    return usage.ru_maxrss << 10
