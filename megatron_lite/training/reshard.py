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
        CheckpointError: ``source`` is not sound or of another model, or ``out`` cannot be written.
        ConfigError: the keys do not make a layout.
    """
    index = read_index(source)
    config = _target(index, paths, overrides)
    check_model(model_shapes(config), index, source)
    return rewrite_checkpoint(source, out, shares_of(config), config.flat()), config


def _target(index: Index, paths: Sequence[Path], overrides: Sequence[str]) -> Config:
    """The configuration to come; without ``world_size`` it has as many data-parallel ranks as there were."""
    base = {key: value for key, value in index.config.items() if key not in OF_THE_OLD_LAYOUT} | SMALLEST
    config = load_config(paths, overrides, base=base)
    if "world_size" not in config.given:
        replicas = config_from_keys(index.config).parallel.data_parallel_size
        config = load_config(paths, overrides, replicas * config.parallel.replica_size, base)
    return config
