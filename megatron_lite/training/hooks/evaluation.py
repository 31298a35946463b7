"""Loss, perplexity and bits per byte on held-out data.

With ``mlm_training`` loss and perplexity are of the hidden tokens, which are the same in every evaluation.
Bits per byte would say nothing then, since most of the text is given, and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch

from megatron_lite.config import Config
from megatron_lite.data.batches import Batch, Fetch, without_rows
from megatron_lite.data.samples import as_sample
from megatron_lite.data.tokenizers import Tokenizer
from megatron_lite.data.windows import Dataset
from megatron_lite.metrics import Backend
from megatron_lite.metrics.progress import Progress
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.training.engine import Engine, StepResult
from megatron_lite.training.state import Hook, TrainState

BYTES_SAMPLES = 64
"""Validation samples whose text is measured to know the bytes of a token."""

AT_ONCE = 64
"""Micro-batches that are loaded, and follow each other through a pipeline, at once."""


class Evaluation(Hook):
    """Evaluates every ``eval_interval`` steps and at the end, always on the same samples.

    ``eval_iters`` batches of ``train_batch_size`` samples, or the whole split if it has fewer.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        engine: Engine,
        dataset: Dataset | None,
        fetch: Fetch,
        tokenizer: Tokenizer,
        backends: list[Backend],
        progress: Progress,
    ) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._dataset = dataset
        self._fetch = fetch
        self._tokenizer = tokenizer
        self._backends = backends
        self._progress = progress
        self._bytes_per_token: float | None = None
        self._last_step: int | None = None

    def begin(self, state: TrainState) -> None:
        """Evaluate the weights that the run begins with, when asked to (``eval_at_start``)."""
        if self._config.training.eval_at_start:
            self._evaluate(state)

    def after_step(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Evaluate at the interval."""
        interval = self._config.training.eval_interval
        if interval and state.step % interval == 0:
            self._evaluate(state)

    def end(self, state: TrainState) -> None:
        """Evaluate the final model; not when a signal asked to be quick."""
        if state.stop_reason is None and self._last_step != state.step:
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        if self._dataset is None or self._config.training.eval_iters == 0:
            return
        with state.aside():
            loss = self._mean_loss(self._dataset)
            perplexity = math.exp(min(loss, 700.0))  # e^700 is as large as a float gets
            values = {"valid/loss": loss, "valid/perplexity": perplexity}
            line = f"step {state.step}  valid loss {loss:.4f}  perplexity {perplexity:.4g}"
            if self._config.objective.mlm_training:
                line += "  of hidden tokens"
            else:
                bits = loss / math.log(2) / self._measured_bytes_per_token(self._dataset)
                values["valid/bits_per_byte"] = bits
                line += f"  bits/byte {bits:.4f}"
        self._last_step = state.step
        for backend in self._backends:
            backend.log(state.step, values)
        self._progress.print(line)

    def _mean_loss(self, dataset: Dataset) -> float:
        """Mean loss per token over the evaluation samples, all ranks together."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._context.device)
        batches = self._batches(dataset)
        while together := list(islice(batches, AT_ONCE)):
            totals += torch.stack(self._engine.eval_loss(together))
        loss_sum, count = self._context.sum_over_replicas(totals).tolist()
        return loss_sum / max(count, 1.0)

    def _batches(self, dataset: Dataset) -> Iterator[Batch]:
        """This rank's micro-batches, all of one size.

        Every rank gets as many as any other, since at ZeRO 3 a forward pass is a collective: samples beyond
        the last one fill them, and do not count.
        """
        training, batch = self._config.training, self._config.batch
        total = min(training.eval_iters * batch.train_batch_size, max(1, dataset.samples_per_epoch))
        size, ranks = batch.train_micro_batch_size_per_gpu, self._context.data_size
        for round_start in range(0, total, size * ranks):
            start = round_start + self._context.data_rank * size
            found = self._fetch(dataset, start, size)
            yield found if start + size <= total else without_rows(found, max(0, total - start))

    def _measured_bytes_per_token(self, dataset: Dataset) -> float:
        """Bytes of UTF-8 text per token of the first evaluation samples, end-of-document tokens left out."""
        if self._bytes_per_token is None:
            size = text = 0
            for index in range(min(BYTES_SAMPLES, max(1, dataset.samples_per_epoch))):
                labels = as_sample(dataset[index]).labels
                labels = labels[labels >= 0]
                size += len(labels)
                kept = labels[labels != self._tokenizer.eod_id].tolist()
                text += len(self._tokenizer.decode(kept).encode())
            self._bytes_per_token = max(text, 1) / max(size, 1)
        return self._bytes_per_token
