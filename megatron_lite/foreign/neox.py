"""A checkpoint of GPT-NeoX as one of ours: weights, step, and the run's keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lite.config import Config
from megatron_lite.foreign.imported import write_import
from megatron_lite.foreign.neox_keys import NeoxRun, find_configs
from megatron_lite.foreign.rank_tensors import RankTensors, find_step
from megatron_lite.hf.whole import check_free


def import_neox(
    folder: Path,
    out: Path,
    configs: Sequence[Path] = (),
    iteration: int | None = None,
    old_grouping: bool | None = None,
) -> Config:
    """Write the model that GPT-NeoX saved in ``folder`` as ``out``: checkpoint, model.yml.

    ``out`` is written whole or not at all, and nothing in the files is run. Everything is checked first; then
    tensors stream, in the memory of one of ours.

    Args:
        folder: a checkpoint (``global_step…``), or the folder of checkpoints.
        out: the new folder of checkpoints; must not exist, or be empty.
        configs: the run's YAML files; none: those that GPT-NeoX saved in the checkpoint.
        iteration: which checkpoint of the folder; the latest when None.
        old_grouping: whether grouped queries lie as GPT-NeoX had them until November 2024; None: told by the
            names of other tensors (:func:`megatron_lite.foreign.neox_table.table`).

    Returns:
        The configuration of model.yml.

    Raises:
        ConfigError: the keys say something that a model here cannot be.
        CheckpointError: weights are missing, left over, of another shape, damaged, or hold code; or ``out``
            cannot be written.
        UserError: ``out`` has content.
    """
    check_free(out)
    checkpoint, step = find_step(folder, iteration)
    run = NeoxRun(configs or find_configs(checkpoint))
    tensors = RankTensors(checkpoint)
    return write_import(out, run.keys(tensors), tensors, "GPT-NeoX", step, old_grouping)
