"""Keys of what a person sees."""

from __future__ import annotations

from megatron_lite.config.fields import Bool, PositiveFloat, Section, Text


class LoggingSection(Section):
    """Where figures go, besides `<run_dir>/metrics.jsonl` and the terminal."""

    tensorboard_dir: Text | None = None
    """Write TensorBoard files there."""
    use_wandb: Bool = False
    """Report to Weights & Biases (`WANDB_MODE=offline` works)."""
    wandb_project: Text = "megatron_lite"
    """Its project."""
    wandb_group: Text | None = None
    """Its group of runs."""
    wandb_run_name: Text | None = None
    """Its name of the run."""
    wandb_team: Text | None = None
    """Its team (entity)."""
    wandb_host: Text = "https://api.wandb.ai"
    """Its server."""
    peak_theoretical_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s, for the model FLOPs utilisation. None: from a table, or measured."""
    wall_clock_breakdown: Bool = False
    """Time the parts of a step (DeepSpeed's timers); in a pipeline, report the share of the time in which
    stages wait, beside the formula's."""
    layout_account: Bool = False
    """Every `log_interval` steps, and at the end, report what the layout costs: bytes that a rank sends, by
    kind of parallelism, counted and by formula, and in a pipeline the share of the time in which stages
    wait."""
