"""A tiny model trained under any layout, for the tests of parallelism (run inside ``run_ranks``)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

from megatron_lite.config import config_from_keys
from megatron_lite.data.batches import Batch

SAMPLES = 24
LENGTH = 16
LR = 2e-3
KEYS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "pos_emb": "rotary",
    "vocab_size": 64,
    "make_vocab_size_divisible_by": 8,
    "train_batch_size": SAMPLES,
    "train_iters": 20,
    "optimizer": {"type": "Adam", "params": {"lr": LR}},
    "tokenizer_type": "ByteTokenizer",
    "data_path": "unused",
    "run_dir": "unused",
}


@dataclass(frozen=True)
class Case:
    """One run: the keys that differ from ``KEYS``, and what happens.

    Attributes:
        name: of the folder into which it saves.
        keys: the keys.
        masked: whether the loss leaves tokens out.
        samples: the global batch of each step in turn, repeated.
        first, last: the steps.
        load: folder of the checkpoint it begins with.
        saved_at: a step after which it also saves.
        documents: whether several documents stand in a row and do not see each other.
        counted: whether the bytes that are sent in a step are counted, in every step but the first.
    """

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    samples: tuple[int, ...] = (SAMPLES,)
    first: int = 0
    last: int = 20
    load: str | None = None
    saved_at: int | None = None
    counted: bool = False
    documents: bool = False


@dataclass(frozen=True)
class Outcome:
    """Loss and gradient norm of each step, and the evaluation loss afterwards, as one rank sees them.

    ``traffic`` is the bytes that a rank sends in a step, by kind, mean over the ranks.
    """

    losses: list[float]
    norms: list[float]
    eval_loss: float
    traffic: dict[str, float] = field(default_factory=dict)


def global_batch(step: int, count: int, masked: bool, documents: bool = False) -> Batch:
    """The step's samples: a walk through the tokens that can be learned, with noise."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 16, (count, 1), generator=generator)
    noise = torch.randint(0, 3, (count, LENGTH + 1), generator=generator)
    samples = (start + 7 * torch.arange(LENGTH + 1) + noise) % 64
    mask = (torch.rand(count, LENGTH, generator=generator) < 0.4).float() if masked else None
    starts = None
    if documents:
        begins = torch.rand(count, LENGTH, generator=generator) < 0.2
        starts = torch.where(begins, torch.arange(LENGTH), 0).cummax(1).values
    return Batch(samples[:, :-1].contiguous(), samples[:, 1:].contiguous(), mask, starts)


def rows(batch: Batch, start: int, count: int) -> Batch:
    """``count`` samples of ``batch``."""
    part = slice(start, start + count)
    mask = None if batch.loss_mask is None else batch.loss_mask[part]
    starts = None if batch.starts is None else batch.starts[part]
    return Batch(batch.tokens[part], batch.labels[part], mask, starts)


def run_case(case: Case, world_size: int, folder: Path) -> Outcome:
    """One rank of ``case``."""
    from megatron_lite.checkpoint import load_checkpoint, save_checkpoint
    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.parallel.traffic import Traffic
    from megatron_lite.training.distributed import distributed
    from megatron_lite.training.run import open_engine

    config = config_from_keys({**KEYS, **case.keys}, world_size=world_size)
    context = context_from_environment()
    losses, norms = [], []
    with distributed(context):
        context = arrange(context, config.parallel)
        engine = open_engine(config, context)
        traffic = Traffic(context)
        if case.load:
            load_checkpoint(folder / case.load, engine.deepspeed, context)

        def save(step: int) -> None:
            state, keys = {"step": step}, config.flat()
            save_checkpoint(folder / case.name, step, engine.deepspeed, state, keys, context)

        size = config.batch.train_micro_batch_size_per_gpu
        for step in range(case.first, case.last):
            count = case.samples[step % len(case.samples)]
            batch = global_batch(step, count, case.masked, case.documents)
            starts = range(context.data_rank * size, count, size * context.data_size)
            with traffic if case.counted and step > case.first else nullcontext():
                result = engine.train_step([rows(batch, start, size) for start in starts], LR)
            losses.append(float(context.sum_over_replicas(result.loss.clone())) / context.replicas.size)
            norms.append(float(result.grad_norm))
            if case.saved_at == step + 1:
                save(step + 1)
        save(case.last)
        assert_copies_are_equal(engine.deepspeed.module, context)
        totals = torch.zeros(2, dtype=torch.float64)
        for number in (4, 2):  # the second batch has another shape
            batches = [
                global_batch(1000 + number + seed, number, case.masked, case.documents) for seed in range(3)
            ]
            totals += torch.stack(engine.eval_loss(batches))
        context.sum_over_replicas(totals)
        engine.deepspeed.destroy()
        sent = mean_by_kind(traffic, case.last - case.first - 1)
    return Outcome(losses, norms, float(totals[0] / totals[1]), sent)


def mean_by_kind(traffic: Any, steps: int) -> dict[str, float]:
    """Bytes a step of each kind there is, the mean over the ranks."""
    from megatron_lite.parallel.traffic import KINDS

    sent = torch.tensor([traffic.bytes[kind] for kind in KINDS], dtype=torch.float64)
    torch.distributed.all_reduce(sent)
    sent /= max(steps, 1) * torch.distributed.get_world_size()
    return {kind: size for kind, size in zip(KINDS, sent.tolist(), strict=True) if size}


def assert_copies_are_equal(module: torch.nn.Module, context: Any) -> None:
    """A parameter that two pipeline stages hold is the same on both."""
    if context.pipe.size == 1:
        return
    own = {p.spec.name: float(p.detach().double().square().sum()) for p in module.parameters()}
    stages: list[Any] = [None] * context.pipe.size
    torch.distributed.all_gather_object(stages, own, group=context.pipe.group)
    for earlier, later in zip(stages, stages[1:] + stages[:1], strict=True):
        for name in earlier.keys() & later.keys():
            assert earlier[name] == later[name], f"{name} differs between stages"


def run_all(cases: list[Case], world_size: int, folder: Path) -> list[Outcome]:
    """One rank of several cases, one after the other in the same process."""
    return [run_case(case, world_size, folder) for case in cases]


def outcomes(cases: list[Case], world_size: int, folder: Path) -> list[Outcome]:
    """Each case on ``world_size`` ranks; every rank must tell the same."""
    by_rank = run_ranks(run_all, world_size, cases, world_size, folder)
    assert all(told == by_rank[0] for told in by_rank), "the ranks disagree"
    return by_rank[0]
