"""Saving beside the training: the state is copied at the step, the bytes reach the disk while it goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lite.checkpoint.save import write_checkpoint
from megatron_lite.checkpoint.signs import Relay, Sign, unheard
from megatron_lite.checkpoint.snapshot import copied, take_snapshot
from megatron_lite.checkpoint.together import largest, together
from megatron_lite.parallel.context import ParallelContext

PATIENCE = timedelta(days=1)
"""How long a rank's thread waits for another rank's disk. A rank that died is noticed at once."""

DONE, BUSY, FAILED = range(3)
"""A save as one rank sees it."""


class BackgroundSaver:
    """Does what ``save_checkpoint`` does in a thread of each rank, one save at a time.

    The threads agree with each other as the ranks do in ``save_checkpoint``: over a gloo group that nobody
    else uses, so that nothing of theirs comes between the collectives of the training. What they did ends
    alike on every rank. Ranks learn of it at the same step through another group, in :meth:`poll`.

    Every rank makes one at the same time, and calls the methods at the same steps. ``sign`` is told that the
    rank lives while it waits for its thread.
    """

    def __init__(self, context: ParallelContext, sign: Sign = unheard) -> None:
        several = context.world_size > 1
        self._context = context
        self._sign, self._thread_sign = sign, Relay(sign)
        self._threads_group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self._steps_group = dist.new_group(backend="gloo") if several else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save: Future[Path] | None = None

    def start(
        self,
        folder: Path,
        step: int,
        engine: Any,
        trainer_state: dict[str, Any],
        config_keys: dict[str, Any],
        keep_last: int | None = None,
    ) -> Path | None:
        """Copy the state, and begin to write it; the arguments are those of ``save_checkpoint``.

        Waits for the save before this one, and returns its checkpoint if there was one. Costs this rank's
        share of the checkpoint until it is written: in CPU memory, or on NVMe where the state is there.

        Raises:
            CheckpointError: on every rank alike: that save failed, or this one cannot begin.
        """
        previous = self.wait()
        context = self._context
        snapshot = together(
            context,
            lambda: copied(take_snapshot(step, engine, trainer_state, config_keys, context), context.device),
            sign=self._sign,
        )
        self._save = self._thread.submit(
            write_checkpoint, folder, snapshot, context, keep_last, self._threads_group, self._thread_sign
        )
        return previous

    def poll(self) -> Path | None:
        """The checkpoint, if one has become complete on every rank since the last call; does not wait for it.

        Raises:
            CheckpointError: on every rank alike: it could not be written (a full disk).
        """
        if self._save is None:
            return None
        state = BUSY
        if self._save.done():
            state = FAILED if self._save.exception() else DONE
        return None if largest(self._context, state, self._steps_group) == BUSY else self.wait()

    def wait(self) -> Path | None:
        """Wait for the save that is under way, if there is one; its checkpoint. No collective.

        Raises:
            CheckpointError: as :meth:`poll`.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        with self._thread_sign.awaited():
            return save.result()

    def close(self) -> None:
        """Let the thread finish and end, whatever became of the run: its collectives need nothing of it."""
        with self._thread_sign.awaited():
            self._thread.shutdown()
