"""Figures for Weights & Biases (keys ``use_wandb`` and ``wandb_*``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.config import Config
from megatron_lite.utils.errors import ConfigError


class WeightsAndBiases:
    """One W&B run. ``WANDB_MODE=offline`` keeps it in ``run_dir`` for a later ``wandb sync``."""

    def __init__(self, run: Any) -> None:
        self._run = run
        # The step is a figure like the others: W&B's own counter refuses to go back when a run is resumed.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log ``values`` against ``step``."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_wandb(config: Config, run_dir: Path) -> WeightsAndBiases | None:
    """A W&B run with every resolved key as its config, when ``use_wandb`` is set.

    Raises:
        ConfigError: W&B cannot be reached, or nobody is logged in.
    """
    keys = config.logging
    if not keys.use_wandb:
        return None
    import wandb  # a second, paid only by who asks for it

    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=keys.wandb_project,
            entity=keys.wandb_team,
            group=keys.wandb_group,
            name=keys.wandb_run_name,
            dir=str(run_dir),
            config=config.flat(),
            settings=wandb.Settings(base_url=keys.wandb_host, console="off", silent=True),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"use_wandb: Weights & Biases at {keys.wandb_host} did not start ({reason}): run `wandb login`, "
            "or set WANDB_MODE=offline, or turn use_wandb off"
        ) from error
    return WeightsAndBiases(run)
