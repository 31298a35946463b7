"""One rank of a training run, from a prepared configuration to the last checkpoint."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any, cast

from megatron_lite.checkpoint import find_checkpoint, load_checkpoint
from megatron_lite.checkpoint.folder import LATEST, complete_steps
from megatron_lite.checkpoint.signs import Sign
from megatron_lite.config import Config
from megatron_lite.config.cli import is_launched, typed_command
from megatron_lite.data.batches import Fetch, micro_batch, unread
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.launcher.placement import own_machine, tell_of_actual_machines
from megatron_lite.metrics import open_backends
from megatron_lite.metrics.progress import Progress
from megatron_lite.model import build_gpt
from megatron_lite.parallel.context import ParallelContext, arrange
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.training.batch_ramp import BatchPlan, plan_batches
from megatron_lite.training.data_state import resume_data
from megatron_lite.training.distributed import distributed
from megatron_lite.training.engine import Engine
from megatron_lite.training.hooks.account import BubbleReport, LayoutAccount
from megatron_lite.training.hooks.checkpoints import Checkpoints
from megatron_lite.training.hooks.evaluation import Evaluation
from megatron_lite.training.hooks.figures import Figures
from megatron_lite.training.hooks.heartbeat import Heartbeat
from megatron_lite.training.hooks.mixture import MixtureReport
from megatron_lite.training.hooks.stopping import Stopping
from megatron_lite.training.loop import run_steps
from megatron_lite.training.objectives import OBJECTIVES
from megatron_lite.training.pipeline_engine import PipelineEngine
from megatron_lite.training.schedule import Schedule
from megatron_lite.training.stages import PipelinedGPT
from megatron_lite.training.state import Hook, TrainState
from megatron_lite.training.watchdog import Watchdog
from megatron_lite.training.zero import swap_space
from megatron_lite.utils.errors import CheckpointError, ConfigError
from megatron_lite.utils.files import write_text
from megatron_lite.utils.log import LOGGER


def train(config: Config, context: ParallelContext) -> int:
    """Train as ``config`` says (with data, tokenizer and vocabulary filled in by ``prepare_data``).

    Returns the exit status: 0 when ``train_iters`` are done or a signal stopped the run after saving.

    Raises:
        UserError: what is wrong with keys, data or a checkpoint, or that the loss is not a number.
    """
    with Watchdog(context, config.training.distributed_timeout) as watchdog:
        return _train(config, context, watchdog)


def _train(config: Config, context: ParallelContext, watchdog: Watchdog) -> int:
    batch = config.batch
    if config.training.train_iters == 0:
        raise ConfigError("train_iters is not given: say how many steps to train.")
    quantum = batch.train_micro_batch_size_per_gpu * config.parallel.data_parallel_size
    plan = plan_batches(batch.train_batch_size, config.model.seq_length, batch.rampup_batch_size, quantum)
    schedule = schedule_of(config)
    checkpoint = checkpoint_to_load(config)
    datasets = open_datasets(config)
    _ = datasets.train  # missing or damaged files are told of before the ranks meet
    tokenizer = load_tokenizer(config.data)
    watchdog.sign("the ranks' meeting", longer=True)
    limit = config.training.distributed_timeout
    with distributed(context, limit), swap_space(config, context), watchdog.among_all():
        watchdog.sign("the start", longer=True)
        context = arrange(context, config.parallel)
        tell_where_ranks_are(config, context)
        engine = open_engine(config, context)
        fetch = fetch_for(config, context, tokenizer)
        state, saved = begin_from(checkpoint, config, context, engine, watchdog.sign)
        watchdog.sign("the start", longer=True)
        state.data = resume_data(config, context, datasets, plan, state.step, state.samples, saved)
        training_data = datasets.train.with_phases(state.data.phases)
        if context.is_first:
            write_text(config.run_dir / "config.yml", config.to_yaml())
        engine.deepspeed.module.register_forward_pre_hook(watchdog.alive)  # every micro-batch
        signing = watchdog.signing(fetch)  # for evaluation; training's batches come from another thread
        hooks = make_hooks(
            config, context, engine, plan, training_data, datasets.valid, signing, tokenizer, state, watchdog
        )
        try:
            run_steps(config, context, engine, training_data, fetch, schedule, plan, state, hooks)
        finally:
            for hook in hooks:
                hook.close()
    if state.stop_reason and context.is_first:
        under = "" if context.world_size == 1 or is_launched() else " under the same launcher"
        how = f"go on{under} with: {resume_command(config)}"
        print(f"stopped after step {state.step} ({state.stop_reason}); {how}")
    return 0


def tell_where_ranks_are(config: Config, context: ParallelContext) -> None:
    """Warn (rank 0) of tensor-parallel groups over several machines, by where the ranks really are."""
    if context.tensor.size > 1:
        machines = context.of_every_rank(own_machine())
        if context.is_first:
            tell_of_actual_machines(config, machines)


def fetch_for(config: Config, context: ParallelContext, tokenizer: Tokenizer) -> Fetch:
    """How this rank gets its micro-batches.

    A stage in the middle of a pipeline needs no samples, unless attention goes by their documents.
    """
    masked_token = tokenizer.eod_id if config.data.eod_mask_loss else None
    document_end = tokenizer.eod_id if config.data.reset_attention_mask else None
    sees_documents = document_end is not None or config.data.pack_impl != "packed"
    if 0 < context.pipe.rank < context.pipe.size - 1 and not sees_documents:
        return partial(unread, length=config.model.seq_length)
    return partial(micro_batch, device=context.device, masked_token=masked_token, document_end=document_end)


def open_engine(config: Config, context: ParallelContext) -> Engine:
    """The model under the engine that the layout needs: a pipeline's, or the plain one."""
    objective = OBJECTIVES["causal_lm"]
    factory = partial(ParameterFactory.of_rank, config, context)
    if context.pipe.size > 1:
        return PipelineEngine(
            config, context, lambda dtype: PipelinedGPT(config, context, factory(dtype)), objective
        )
    return Engine(config, context, lambda dtype: build_gpt(config, factory(dtype)), objective)


def make_hooks(
    config: Config,
    context: ParallelContext,
    engine: Engine,
    plan: BatchPlan,
    data: Mixture,
    valid: Mixture | None,
    fetch: Fetch,
    tokenizer: Tokenizer,
    state: TrainState,
    watchdog: Watchdog,
) -> list[Hook]:
    """What hangs on the loop, in the order in which it happens after a step.

    What a step achieved is saved before it is evaluated: an evaluation takes long, and may fail.
    """
    backends = open_backends(config, config.run_dir)
    progress = Progress(config.training.train_iters, state.step, enabled=context.is_first)
    account: list[Hook] = [LayoutAccount(config, context, progress)] if config.logging.layout_account else []
    if isinstance(engine, PipelineEngine) and engine.bubble:
        account.append(BubbleReport(config, engine.bubble, progress))
    compiles = config.model.torch_compile or context.device.type != "cpu"
    figures = Figures(config, context, engine, backends, progress)
    return [
        Heartbeat(watchdog, compiles),
        *account,
        figures,
        MixtureReport(config, data, plan, backends, progress),
        Stopping(context, config.training.exit_interval),
        Checkpoints(config, context, engine, figures.check, watchdog.sign),
        Evaluation(config, context, engine, valid, fetch, tokenizer, backends, progress),
    ]


def schedule_of(config: Config) -> Schedule:
    """The learning-rate schedule that the keys describe."""
    keys = config.schedule
    return Schedule(
        style=keys.lr_decay_style,
        peak=config.optimizer.lr,
        minimum=keys.min_lr,
        warmup=keys.warmup_steps or 0,
        warmup_tokens=keys.warmup_tokens,
        decay_end=keys.lr_decay_iters,
        decay_length=keys.wsd_decay_iters,
        decay_shape=keys.wsd_decay_style,
    )


def checkpoint_to_load(config: Config) -> Path | None:
    """The checkpoint that the run begins from, or None to begin with fresh weights.

    ``load`` must hold a checkpoint, with one exception: a configuration whose ``load`` and ``save`` are the
    same folder begins afresh the first time (GPT-NeoX's ``local_setup.yml`` does that). Killed when its first
    checkpoint was complete and ``latest`` not yet written, it goes on from that one.
    """
    keys = config.checkpoint
    if keys.load is None:
        return None
    folder = Path(keys.load)
    try:
        return find_checkpoint(folder, keys.iteration)
    except CheckpointError as error:
        may_be_first = keys.loads_own and keys.iteration is None
        if not may_be_first or (folder / LATEST).exists():
            raise CheckpointError(f"load: {error}") from error
    steps = complete_steps(folder)
    if not steps:
        LOGGER.info("no checkpoint in %s yet: beginning with fresh weights", folder)
        return None
    LOGGER.info("%s has no file %s: taking the newest complete checkpoint there", folder, LATEST)
    return find_checkpoint(folder, steps[-1])


def begin_from(
    checkpoint: Path | None, config: Config, context: ParallelContext, engine: Engine, sign: Sign
) -> tuple[TrainState, dict[str, Any]]:
    """Fill ``engine`` from ``checkpoint``, rank 0's. ``finetune`` takes the weights only.

    A host may have found another one: NFS shows it an older ``latest`` for a while after a restart. ``sign``
    is told that this rank lives. Returns the state to go on from, and what the checkpoint tells of the data.
    """
    checkpoint = cast(Path | None, context.broadcast_object(checkpoint))
    if checkpoint is None:
        return TrainState(), {}
    keys = config.checkpoint
    saved = load_checkpoint(
        checkpoint,
        engine.deepspeed,
        context,
        load_optimizer=not (keys.finetune or keys.no_load_optim),
        load_rng=not (keys.finetune or keys.no_load_rng),
        sign=sign,
    )
    if keys.finetune:
        LOGGER.info("weights from %s; beginning at step 0", checkpoint)
        return TrainState(), {}
    LOGGER.info("going on from %s, after step %d", checkpoint, saved["step"])
    state = TrainState(step=saved["step"], samples=saved["samples"], tokens=saved["tokens"])
    return state, saved.get("data", {})


def resume_command(config: Config) -> str:
    """The command that goes on from what this run saved, in full, whatever it began from."""
    keys = config.checkpoint
    settings = [] if keys.load == keys.save else [f"load={keys.save}"]
    if keys.iteration is not None:
        settings.append("iteration=null")
    settings += [f"{key}=false" for key in ("finetune", "no_load_optim", "no_load_rng") if getattr(keys, key)]
    return " ".join([typed_command(), *(["--set", *map(shlex.quote, settings)] if settings else [])])
