"""Figures for TensorBoard (key ``tensorboard_dir``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_lite.config import Config


class TensorBoard:
    """Writes scalars into an event file below ``folder``; ``tensorboard --logdir folder`` shows them."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second, paid only by who asks for it

        self._writer = SummaryWriter(log_dir=str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add each of ``values`` as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def open_tensorboard(config: Config, run_dir: Path) -> TensorBoard | None:
    """TensorBoard at ``tensorboard_dir``, when that key is set."""
    folder = config.logging.tensorboard_dir
    return TensorBoard(Path(folder)) if folder else None
