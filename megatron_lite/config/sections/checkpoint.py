"""Keys of what is kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_lite.config.fields import Bool, NonNegative, Positive, PositiveFloat, Section, Text, derived


class CheckpointSection(Section):
    """Where the run writes, and where it begins."""

    run_dir: Text = derived("runs/<name of the first configuration file>")
    """Folder of the run: its resolved configuration, metrics and, unless `save` says otherwise,
    checkpoints."""
    save: Text = derived("<run_dir>/checkpoints")
    """Folder of the checkpoints."""
    load: Text | None = None
    """Folder of the checkpoints to go on from."""
    iteration: NonNegative | None = None
    """Step of the checkpoint to load. None: the latest."""
    checkpoint_factor: PositiveFloat | None = None
    """Steps between checkpoints; with `checkpoint_scale: log`, the factor between their steps. None: at the
    end only."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    """How the steps of checkpoints grow."""
    extra_save_iters: tuple[NonNegative, ...] = ()
    """Further steps to save at; 0 is before the first one."""
    keep_last_n_checkpoints: Positive | None = None
    """Delete older checkpoints. None: keep all."""
    async_save: Bool = False
    """Go on training while a checkpoint is written. Each rank keeps a copy of its share until then: in the
    machine's memory, on NVMe what is offloaded there."""
    finetune: Bool = False
    """Load the weights only, and begin at step 0."""
    no_load_optim: Bool = False
    """Do not load the optimizer's state."""
    no_load_rng: Bool = False
    """Do not load the state of the random numbers."""

    @property
    def loads_own(self) -> bool:
        """Whether the run begins from the folder that it saves to."""
        return self.load is not None and Path(self.load).absolute() == Path(self.save).absolute()
