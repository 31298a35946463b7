"""The training loop. All that is not a step - figures, evaluation, checkpoints, signals - is a hook."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial

import torch

from megatron_lite.config import Config
from megatron_lite.data.batches import Batch, Fetch
from megatron_lite.data.prefetch import prepared_ahead
from megatron_lite.data.windows import Dataset
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.batch_ramp import BatchPlan
from megatron_lite.training.engine import Engine
from megatron_lite.training.schedule import Schedule
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.utils.seeds import derive_seed


def run_steps(
    config: Config,
    context: ParallelContext,
    engine: Engine,
    dataset: Dataset,
    fetch: Fetch,
    schedule: Schedule,
    plan: BatchPlan,
    state: TrainState,
    hooks: Sequence[Hook],
) -> None:
    """Train from ``state`` to ``train_iters``, or until a hook sets ``state.stop_reason``.

    A thread prepares the next steps' micro-batches meanwhile.
    """
    steps = plan.following(state.samples, config.training.train_iters - state.step)
    prepare = partial(micro_batches, config, context, dataset, fetch)
    for hook in hooks:
        hook.begin(state)
    with closing(prepared_ahead(prepare, steps, begin_thread=partial(choose_device, context))) as feed:
        while state.step < config.training.train_iters and state.stop_reason is None:
            for hook in hooks:
                hook.before_step(state)
            samples = plan.batch(state.samples)
            batches = next(feed)
            lr = schedule.lr(state.step, state.tokens)
            seed_dropout(config, context, state.step)

            result = engine.train_step(batches, lr)

            state.step += 1
            state.samples += samples
            state.tokens += samples * config.model.seq_length
            for hook in hooks:
                hook.after_step(state, result, lr)
    for hook in hooks:
        hook.end(state)


def choose_device(context: ParallelContext) -> None:
    """Let a new thread use this rank's GPU: every thread begins with the first one."""
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)


def micro_batches(
    config: Config, context: ParallelContext, dataset: Dataset, fetch: Fetch, step: tuple[int, int]
) -> list[Batch]:
    """This data rank's share of ``step`` = (first sample, number of samples), in micro-batches.

    Micro-batches are dealt to the data-parallel ranks in turn: which samples a step sees does not depend on
    the number of ranks.
    """
    first, count = step
    size = config.batch.train_micro_batch_size_per_gpu
    starts = range(first + context.data_rank * size, first + count, context.data_size * size)
    return [fetch(dataset, start, size) for start in starts]


def seed_dropout(config: Config, context: ParallelContext, step: int) -> None:
    """Seed the random numbers of one step (dropout) by its number: there is no state to carry over.

    Context ranks have tokens of their own. Tensor ranks begin alike, since they drop the same activations,
    unless they split the sequence.
    """
    part = context.tensor.rank if config.parallel.sequence_parallel else 0
    place = (context.data_rank, context.context.rank, context.pipe.rank, part)
    torch.manual_seed(derive_seed(config.training.seed, "dropout", *place, step))
