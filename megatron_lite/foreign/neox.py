"""A checkpoint of GPT-NeoX as one of ours: weights, step, and the run's keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lite.config import Config, config_from_keys
from megatron_lite.config.reader import to_yaml
from megatron_lite.foreign.neox_folder import RankTensors, find_step
from megatron_lite.foreign.neox_keys import NeoxRun, find_configs
from megatron_lite.foreign.neox_table import is_idle, table
from megatron_lite.hf.assemble import MODEL_FILE, left_over, write_checkpoint
from megatron_lite.hf.whole import check_free, whole_folder
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER


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
    keys = run.keys(tensors) | {
        "load": str(out.absolute()),
        "finetune": True,
        "run_dir": f"runs/{out.absolute().name}-finetuned",
    }
    config = config_from_keys(keys)
    rows = table(config.model, tensors, old_grouping)
    left = left_over(rows, config, tensors.found, "the configuration")
    strange = [name for name in left if not is_idle(name, config.model)]
    if strange:
        raise CheckpointError(
            f"{checkpoint} has {len(strange)} tensor(s) without a place in this model, as {strange[0]}"
        )
    vocabulary = config.data.vocab_file
    if vocabulary is not None and not Path(vocabulary).is_file():
        LOGGER.warning("the tokenizer's file %s is not there: correct %s", vocabulary, MODEL_FILE)
    with whole_folder(out) as temporary:
        text = f"# {checkpoint.absolute().name}, imported from GPT-NeoX.\n{to_yaml(keys)}"
        (temporary / MODEL_FILE).write_text(text, encoding="utf-8")
        write_checkpoint(temporary, config, rows, tensors.found, tensors.read, step=step)
    return config
