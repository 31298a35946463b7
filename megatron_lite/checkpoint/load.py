"""Reading a checkpoint into an engine of any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from megatron_lite.checkpoint.engine_state import (
    restore_counters,
    restore_loss_scaler,
    restore_rng_state,
)
from megatron_lite.checkpoint.files import ElementReader, check_file
from megatron_lite.checkpoint.folder import find_checkpoint
from megatron_lite.checkpoint.fragments import layout_fragments
from megatron_lite.checkpoint.index import IMPORTED, WEIGHT, Index, read_index
from megatron_lite.checkpoint.layouts import layout_of
from megatron_lite.checkpoint.layouts.layout import Layout
from megatron_lite.checkpoint.optimizer_state import make_state, replay_native_steps, restore_scalars
from megatron_lite.checkpoint.read import check_weights
from megatron_lite.checkpoint.save import RNG_KEY, optimizer_file
from megatron_lite.checkpoint.signs import Sign, unheard
from megatron_lite.checkpoint.together import together
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import spec_of
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER

NAMED = 3  # how many offending names an error message lists

ADAMS = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"})
"""Class names of the optimizers that are Adam, with the same state."""


def load_checkpoint(
    path: Path,
    engine: Any,
    context: ParallelContext,
    load_optimizer: bool = True,
    load_rng: bool = True,
    sign: Sign = unheard,
) -> dict[str, Any]:
    """Fill ``engine`` from a checkpoint of any ZeRO stage and number of ranks; every rank calls this.

    Each rank reads the elements that it holds. The checksums of the files are verified first, the ranks
    sharing the work; for the weights alone, of theirs: the others need not be there. Low-precision parameters
    are made from the fp32 weights as the optimizer step makes them. With the layout and the optimizer
    unchanged, training goes on bitwise as if it had never stopped.

    Args:
        path: a checkpoint, or a folder with ``latest``, as rank 0 sees it.
        engine: DeepSpeed's engine, just initialised; its model's parameters carry their ``spec``.
        context: this rank.
        load_optimizer: also optimizer state, loss scale and DeepSpeed's counters; False to fine-tune.
        load_rng: also the random generators, where the number of ranks is that of the writer.
        sign: told that this rank lives, at every read.

    Returns:
        The ``trainer_state`` that was saved.

    Raises:
        CheckpointError: on every rank alike: missing, incomplete, corrupt, or of another model or optimizer.
            The weights are untouched then, unless a file that was sound a moment ago could not be read.
    """

    model = _shapes(engine, context)

    agreed = partial(together, context, sign=sign, doing="loading")
    checkpoint = find_together(context, path, sign=sign)

    def check() -> tuple[Index, Layout]:
        index = read_index(checkpoint)
        check_model(model, index, checkpoint)
        if load_optimizer or load_rng:
            for entry in index.files[context.rank :: context.world_size]:
                check_file(checkpoint, entry, sign)
        else:
            check_weights(checkpoint, index, context.rank, context.world_size, sign)
        layout = layout_of(engine)
        if load_optimizer:
            _check_kind_of_optimizer(layout, index, checkpoint)
        return index, layout

    index, layout = agreed(check)
    with_state = load_optimizer and index.has_optimizer_state
    if with_state:
        agreed(lambda: make_state(layout, index, sign))
        agreed(lambda: _check_optimizer(layout, index, checkpoint, context))
    agreed(lambda: _fill(ElementReader(checkpoint, index, sign), layout, context, with_state, sign))
    sign("loading: the parameters are made of the fp32 weights", longer=True)
    layout.refresh()
    if load_optimizer:
        replay_native_steps(layout)
        restore_loss_scaler(layout, index.loss_scaler)
        restore_counters(engine, index.engine)
    if load_rng:
        agreed(lambda: _restore_rng(checkpoint, index, context))
    context.barrier()
    return index.trainer_state


def _shapes(engine: Any, context: ParallelContext) -> dict[str, tuple[int, ...]]:
    """The whole shape of each parameter of the model, by global name: of all stages, and all experts."""
    known = {spec.name: spec.shape for p in engine.module.parameters() for spec in spec_of(p).members}
    for axis in (context.expert, context.pipe):
        if axis.size > 1:
            found: list[Any] = [None] * axis.size
            dist.all_gather_object(found, known, group=axis.group)
            known = {name: shape for ranks in found for name, shape in ranks.items()}
    return known


def check_model(model: dict[str, tuple[int, ...]], index: Index, checkpoint: Path) -> None:
    """Raise unless checkpoint and model have the same parameters with the same shapes."""
    saved = {name: entry.shape for name, entry in index.parameters.items()}
    differences = [
        ("lacks", sorted(model.keys() - saved.keys())),
        ("has in excess", sorted(saved.keys() - model.keys())),
        (
            "has in another shape",
            [f"{n} {saved[n]} instead of {model[n]}" for n in model if n in saved and saved[n] != model[n]],
        ),
    ]
    problems = [f"it {what} {_few(names)}" for what, names in differences if names]
    if problems:
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(problems)}; use the configuration that wrote it"
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def find_together(
    context: ParallelContext, path: Path, step: int | None = None, sign: Sign = unheard
) -> Path:
    """The checkpoint that :func:`find_checkpoint` finds on rank 0; every rank calls this.

    Asked once, since one run may load while another saves and moves ``latest``.

    Raises CheckpointError on every rank when one finds none.
    """
    found = together(context, partial(find_checkpoint, path, step), sign=sign, doing="loading")
    return cast(Path, context.broadcast_object(found))


def _check_kind_of_optimizer(layout: Layout, index: Index, checkpoint: Path) -> None:
    """Raise unless the optimizer is the one that the checkpoint is of, or both are Adam.

    The state alone does not tell: SGD without momentum has none.
    """
    if layout.optimizer is None:
        return
    if index.optimizer == IMPORTED:
        raise CheckpointError(
            f"{checkpoint} was imported and has weights only: begin at step 0 with them (finetune), or go on "
            f"from step {index.step} with a new optimizer (no_load_optim)"
        )
    name = type(layout.optimizer).__name__
    if name != index.optimizer and not {name, index.optimizer} <= ADAMS:
        raise CheckpointError(
            f"{checkpoint} has the state of the optimizer {index.optimizer}, and this run has {name}; use "
            "the same optimizer, or load the weights only (no_load_optim)"
        )


def _check_optimizer(layout: Layout, index: Index, checkpoint: Path, context: ParallelContext) -> None:
    """Raise unless the optimizer's state has the kinds and shapes that the checkpoint has.

    A parameter may have no state there: it was not trained, or never had a gradient.
    """
    wanted: dict[str, set[str]] = {}
    for holder in layout.holders:
        if holder.optimizer is None:
            continue
        numbers = {k for k, v in holder.state.items() if not hasattr(v, "dim") or v.dim() == 0}
        for part in holder.parts:
            wanted.setdefault(part.name, set()).update(numbers)
    for fragment in layout_fragments(layout, context):
        if fragment.kind == WEIGHT:
            continue
        wanted[fragment.name].add(fragment.kind)
        entry = index.parameters[fragment.name].tensors.get(fragment.kind)
        if entry is not None and entry.shape != fragment.shape:
            raise CheckpointError(
                f"{checkpoint} has the optimizer state {fragment.kind} of {fragment.name} in shape "
                f"{entry.shape}, and this run needs {fragment.shape}"
            )
    for name, kinds in wanted.items():
        saved = index.parameters[name].state_kinds
        if saved and saved != kinds:
            raise CheckpointError(
                f"{checkpoint} has other optimizer state for {name} ({', '.join(sorted(saved))}, by "
                f"{index.optimizer}) than this run's {type(layout.optimizer).__name__} needs "
                f"({', '.join(sorted(kinds)) or 'none'}); use the same optimizer with the same settings, or "
                "load the weights only (no_load_optim)"
            )


def _fill(
    reader: ElementReader, layout: Layout, context: ParallelContext, with_state: bool, sign: Sign
) -> None:
    """Read this rank's elements, and set the numbers of the optimizer's state."""
    parameters = reader.index.parameters
    for holder in layout.holders:
        # ZeRO 3 leaves the padding of its partitions uninitialised, and optimizers that take norms see it.
        sign("loading")
        holder.tensor.detach().zero_()
    for fragment in layout_fragments(layout, context):
        if fragment.kind == WEIGHT or (with_state and fragment.kind in parameters[fragment.name].tensors):
            reader.read_into(fragment.data, fragment.name, fragment.kind, fragment.start, fragment.region)
    if with_state:
        for holder in layout.holders:
            restore_scalars(holder, parameters)


def _restore_rng(checkpoint: Path, index: Index, context: ParallelContext) -> None:
    """Set this rank's random generators, where as many ranks wrote theirs."""
    state = None
    if index.world_size == context.world_size:
        own = optimizer_file(checkpoint, context.rank).name
        number = next(i for i, entry in enumerate(index.files) if entry.name == own)
        state = ElementReader(checkpoint, index).metadata(number).get(RNG_KEY)
    if state is not None:
        restore_rng_state(state, context.device)
    elif context.is_first:
        LOGGER.info(
            "%s has no random generators for %d ranks: they start anew", checkpoint, context.world_size
        )
