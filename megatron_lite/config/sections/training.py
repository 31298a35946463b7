"""Keys of the training loop."""

from __future__ import annotations

from megatron_lite.config.fields import Bool, NonNegative, Positive, Section


class TrainingSection(Section):
    """How long to train, and what happens when."""

    train_iters: NonNegative = 0
    """Optimizer steps of the whole run."""
    seed: NonNegative = 1234
    """Seed of the weights, the data order and the dropouts."""
    eval_interval: NonNegative = 1000
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_iters: NonNegative = 100
    """Batches in an evaluation; 0 evaluates never."""
    eval_at_start: Bool = False
    """Evaluate before the first step too."""
    log_interval: Positive = 100
    """Steps between lines of the log."""
    exit_interval: Positive | None = None
    """Save and exit after a step divisible by this."""
    distributed_timeout: Positive = 1800
    """Seconds that a rank may give no sign of life; then every rank shows its Python stack and the run ends.
    Signs are each step, each micro-batch, in a save each 16 MiB, in loading each read. The start, a first
    step on an accelerator or with `torch_compile`, and waiting for the others' disks may take half an hour,
    or this if it is more."""
