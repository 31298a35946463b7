"""A checkpoint cut for another layout, offline: on one process, in the memory of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lite.checkpoint.index import Index, read_index
from megatron_lite.checkpoint.load import check_model
from megatron_lite.checkpoint.rewrite import rewrite_checkpoint
from megatron_lite.checkpoint.verification import model_shapes
from megatron_lite.config import Config, config_from_keys, load_config
from megatron_lite.training.shares import shares_of
from megatron_lite.utils.errors import CheckpointError

OF_THE_OLD_LAYOUT = ("world_size", "gradient_accumulation_steps")
"""Keys of the run that wrote the checkpoint which say nothing about the run that will load it."""

SMALLEST = {"train_micro_batch_size_per_gpu": 1}
"""Fits the most layouts; the run that will load the checkpoint names its own."""


def reshard(
    source: Path, out: Path, paths: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> tuple[Path, Config]:
    """Write the checkpoint ``source`` for the layout that its configuration has with these changes.

    Args:
        source: a checkpoint.
        out: the new folder of checkpoints; must not exist, or be empty.
        paths: YAML files that override keys of the checkpoint's configuration.
        overrides: ``key=value`` words that override all.

    Returns:
        The new checkpoint, and the configuration of its layout.

    Raises:
        CheckpointError: ``source`` is not sound, of another model, or has state that the new layout cannot
            load, or ``out`` cannot be written.
        ConfigError: the keys do not make a layout.
    """
    index = read_index(source)
    config = _target(index, paths, overrides)
    check_model(model_shapes(config), index, source)
    _check_factors(index, config, source)
    return rewrite_checkpoint(source, out, shares_of(config), config.flat()), config


def _check_factors(index: Index, config: Config, source: Path) -> None:
    """Raise when Adafactor's factors would go where it keeps none, or the other way round."""
    if config.optimizer.type != "adafactor" or not index.has_optimizer_state:
        return
    has = any(t.shape != entry.shape for entry in index.parameters.values() for t in entry.tensors.values())
    wants = config.engine_stage == 0
    if has != wants:
        kind = "rows and columns" if has else "flat slices"
        raise CheckpointError(
            f"{source} has Adafactor's state of {kind}, and ZeRO stage {config.zero.stage} in "
            f"{config.precision.precision} keeps the other: its checkpoints do not move between stage 0 and "
            "the others"
        )


def _target(index: Index, paths: Sequence[Path], overrides: Sequence[str]) -> Config:
    """The configuration to come; without ``world_size`` it has as many data-parallel ranks as there were."""
    base = {key: value for key, value in index.config.items() if key not in OF_THE_OLD_LAYOUT} | SMALLEST
    config = load_config(paths, overrides, base=base)
    if "world_size" not in config.given:
        replicas = config_from_keys(index.config).parallel.data_parallel_size
        config = load_config(paths, overrides, replicas * config.parallel.replica_size, base)
    return config
