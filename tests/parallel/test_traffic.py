"""What ranks send: every operation's bytes by hand, whole steps by formula, all of it by torch's profiler."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from layout_runs import KEYS, LR, Case, global_batch, outcomes, rows
from ranks import run_ranks

from megatron_lite.config import config_from_keys
from megatron_lite.planner.traffic import step_traffic

NUMBERS = 12
BYTES = 4 * NUMBERS


def operations() -> dict[str, float]:
    """Bytes that this one of three ranks sends in each of torch's collectives, as they are counted."""
    import torch
    import torch.distributed as dist

    from megatron_lite.parallel.context import Axis, ParallelContext
    from megatron_lite.parallel.traffic import Traffic

    rank = dist.get_rank()
    everyone = Axis(3, rank)
    context = ParallelContext(rank, 3, rank, torch.device("cpu"), data=everyone, replicas=everyone)

    def tensor(times: int = 1) -> torch.Tensor:
        return torch.ones(times * NUMBERS)

    def tensors() -> list[torch.Tensor]:
        return [tensor() for _ in range(3)]

    def ring() -> None:
        to, origin, came = (rank + 1) % 3, (rank - 1) % 3, tensor()
        exchanges = [dist.P2POp(dist.isend, tensor(), to), dist.P2POp(dist.irecv, came, origin)]
        for work in dist.batch_isend_irecv(exchanges):
            work.wait()

    uneven = [NUMBERS - 2 if other == rank else 1 for other in range(3)]  # this rank keeps most of it
    calls: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(tensor()),
        "all_reduce, later": lambda: dist.all_reduce(tensor(), async_op=True).wait(),
        "all_gather": lambda: dist.all_gather(tensors(), tensor()),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(tensor(3), tensor()),
        "reduce_scatter": lambda: dist.reduce_scatter(tensor(), tensors()),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(tensor(), tensor(3)),
        "broadcast": lambda: dist.broadcast(tensor(), 1),
        "reduce": lambda: dist.reduce(tensor(), 1),
        "gather": lambda: dist.gather(tensor(), tensors() if rank == 0 else None, dst=0),
        "scatter": lambda: dist.scatter(tensor(), tensors() if rank == 0 else None, src=0),
        "all_to_all_single": lambda: dist.all_to_all_single(tensor(), tensor()),
        "all_to_all_single, uneven": lambda: dist.all_to_all_single(tensor(), tensor(), uneven, uneven),
        "all_to_all": lambda: dist.all_to_all(tensors(), tensors()),
        "ring of sends": ring,
        "barrier": dist.barrier,
    }
    untouched = dict(vars(dist.ProcessGroup))
    found = {}
    for name, call in calls.items():
        with Traffic(context) as traffic:
            call()
        assert set(traffic.bytes) <= {"data" if "sends" not in name else "pipe"}, name
        found[name] = sum(traffic.bytes.values())
    assert dict(vars(dist.ProcessGroup)) == untouched, "closed, it leaves nothing behind"
    return found


def test_the_bytes_of_every_operation() -> None:
    for rank, found in enumerate(run_ranks(operations, 3)):
        assert found == pytest.approx(
            {
                "all_reduce": 2 * BYTES * 2 / 3,
                "all_reduce, later": 2 * BYTES * 2 / 3,
                "all_gather": 2 * BYTES,
                "all_gather_into_tensor": 2 * BYTES,
                "reduce_scatter": 2 * BYTES,
                "reduce_scatter_tensor": 2 * BYTES,
                "broadcast": BYTES * 2 / 3,
                "reduce": BYTES * 2 / 3,
                "gather": 0 if rank == 0 else BYTES,
                "scatter": 2 * BYTES if rank == 0 else 0,
                "all_to_all_single": BYTES * 2 / 3,
                "all_to_all_single, uneven": 2 * 4,
                "all_to_all": 2 * BYTES,
                "ring of sends": BYTES,
                "barrier": 0,
            }
        )


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **settings}}


RELEASED = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
TENSOR, SPLIT = {"model_parallel_size": 2}, {"model_parallel_size": 2, "sequence_parallel": True}
STAGES = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 3}
RECOMPUTE = {"checkpoint_activations": True, "checkpoint_num_layers": 2}
OTHER_MODEL = {
    "num_kv_heads": 1, "use_qk_layernorm": True, "no_weight_tying": True, "gpt_j_residual": True,
    "gpt_j_tied": True, "activation": "swiglu", "mlp_multiple_of": 8, "pos_emb": "learned",
    "opt_pos_emb_offset": 2, "kv_channels": 12, "norm": "non_parametric_layernorm",
    "use_bias_in_qkv": False,
}  # fmt: skip

BY_RANKS: dict[int, list[dict[str, Any]]] = {
    2: [
        zero(0),
        zero(1),
        zero(2),
        zero(3),
        zero(3, **RELEASED),
        zero(1, use_multi_rank_bucket_allreduce=True),
        zero(1) | {"precision": "bf16"},
        zero(1, offload_optimizer={"device": "cpu"}) | {"precision": "bf16"},
        zero(2) | {"precision": "fp16"},
        zero(0) | {"communication_data_type": "bf16"},
        zero(1) | {"communication_data_type": "fp32", "precision": "bf16"},
        zero(2) | {"communication_data_type": "bf16"},
        zero(3) | {"communication_data_type": "fp32", "precision": "bf16"},
        TENSOR,
        TENSOR | RECOMPUTE,
        TENSOR | OTHER_MODEL,
        SPLIT,
        SPLIT | RECOMPUTE | {"hidden_dropout": 0.1},
        SPLIT | OTHER_MODEL,
        STAGES,
        STAGES | {"no_weight_tying": True, "precision": "bf16"},
    ],
    4: [
        zero(1) | TENSOR | {"precision": "bf16"},
        zero(3) | SPLIT,
        SPLIT | STAGES | RECOMPUTE,
        STAGES | zero(1),
        STAGES | {"pipe_parallel_size": 4},
        OTHER_MODEL | {"model_parallel_size": 4, "num_kv_heads": 2},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", BY_RANKS)
def test_whole_steps_send_what_the_formulas_say(ranks: int, tmp_path: Path) -> None:
    batch = {"hidden_size": 64, "train_micro_batch_size_per_gpu": 2}
    cases = [
        Case(str(number), batch | keys, last=3, counted=True) for number, keys in enumerate(BY_RANKS[ranks])
    ]
    for case in cases:
        if "gradient_accumulation_steps" in case.keys:
            case.keys.pop("train_micro_batch_size_per_gpu")
    for case, outcome in zip(cases, outcomes(cases, ranks, tmp_path), strict=True):
        config = config_from_keys({**KEYS, **case.keys}, world_size=ranks)
        formula = step_traffic(config, config.batch.gradient_accumulation_steps)
        counted = dict(outcome.traffic)
        assert counted.pop("control", 0) < 100, case.keys
        assert counted == pytest.approx(formula, rel=0.002), case.keys


def counted_and_profiled(cases: list[dict[str, Any]], world_size: int) -> list[tuple[int, int]]:
    """Operations of a step: by our count, and torch's profiler's of what the back end was asked to send."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.parallel.traffic import Traffic
    from megatron_lite.training.distributed import distributed
    from megatron_lite.training.run import open_engine

    found = []
    for keys in cases:
        config = config_from_keys({**KEYS, "train_batch_size": 8, **keys}, world_size=world_size)
        with distributed(context_from_environment()):
            context = arrange(context_from_environment(), config.parallel)
            engine = open_engine(config, context)
            size = config.batch.train_micro_batch_size_per_gpu
            starts = range(context.data_rank * size, 8, size * context.data_size)
            micro_batches = [rows(global_batch(0, 8, True), start, size) for start in starts]
            with Traffic(context) as traffic, profile(activities=[ProfilerActivity.CPU]) as profiled:
                engine.train_step(micro_batches, LR)
            engine.deepspeed.destroy()
        assert not traffic.bytes["elsewhere"]
        sent = [event for event in profiled.events() if event.name.startswith("c10d::")]
        found.append((traffic.calls.total(), sum(event.name != "c10d::recv_" for event in sent)))
    return found


@pytest.mark.slow
def test_no_collective_is_hidden() -> None:
    stages = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}
    ring = {"context_parallel_size": 2, "context_parallel_kind": "ring"}
    experts = {"moe_num_experts": 4, "moe_top_k": 2, "expert_interval": 1, "expert_parallel_size": 2}
    cases = [zero(2) | SPLIT, zero(3) | TENSOR, stages | zero(1) | SPLIT, zero(1) | ring, zero(2) | experts]
    for rank in run_ranks(counted_and_profiled, 4, cases, 4):
        for counted, profiled in rank:
            assert counted == profiled > 20


def reported() -> str:
    """What the hook prints of three steps of two micro-batches on each of two data-parallel ranks."""
    import torch
    import torch.distributed as dist

    from megatron_lite.metrics.progress import Progress
    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.training.engine import StepResult
    from megatron_lite.training.hooks.account import LayoutAccount
    from megatron_lite.training.state import TrainState

    keys = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "log_interval": 2}
    config = config_from_keys({**KEYS, **keys}, world_size=2)
    stream, state = io.StringIO(), TrainState()
    context = arrange(context_from_environment(), config.parallel)
    hook = LayoutAccount(config, context, Progress(2, stream=stream))
    for _ in range(3):  # the interval's two, and one that only the end reports
        hook.before_step(state)
        dist.all_reduce(torch.ones(1000))
        dist.all_reduce(torch.ones(1))
        state.step, state.samples = state.step + 1, state.samples + 8
        hook.after_step(state, StepResult(torch.zeros(()), 0.0, False, 1.0), 0.0)
        dist.all_reduce(torch.ones(5000))  # not within a step
    hook.end(state)
    hook.close()
    return stream.getvalue()


def test_the_account_says_what_was_counted_beside_the_formula() -> None:
    text = run_ranks(reported, 2)[0]
    lines = [line.split() for line in text.splitlines() if line.startswith("  ")]
    config = config_from_keys(
        {**KEYS, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, world_size=2
    )
    assert lines == [["data", "4,000", f"{step_traffic(config, 2)['data']:,.0f}"], ["control", "4"]] * 2


def test_a_run_that_ends_before_the_interval_tells_its_bubble() -> None:
    import torch

    from megatron_lite.metrics.progress import Progress
    from megatron_lite.training.engine import StepResult
    from megatron_lite.training.hooks.account import BubbleReport
    from megatron_lite.training.state import TrainState

    class Measured:
        def shares(self) -> tuple[float, float]:
            return 24.1, 20.0

    config = config_from_keys({**KEYS, "log_interval": 2}, world_size=1)
    stream, state = io.StringIO(), TrainState()
    hook = BubbleReport(config, Measured(), Progress(3, stream=stream))
    for steps_told in (0, 1, 1):
        state.step += 1
        hook.after_step(state, StepResult(torch.zeros(()), 0.0, False, 1.0), 0.0)
        assert stream.getvalue().count("24.1 % measured") == steps_told
    hook.end(state)
    assert stream.getvalue().count("24.1 % measured") == 2
