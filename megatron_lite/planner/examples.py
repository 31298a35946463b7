"""The layouts that ``docs/choosing-a-layout.md`` compares, and the table of what each needs of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.config import Config, load_config
from megatron_lite.planner.memory import MemoryEstimate, estimate_memory
from megatron_lite.planner.parameters import count_parameters

STATES = ("parameters", "gathered parameters", "gradients", "optimizer", "update")
ACTIVATIONS = ("activations", "logits")


@dataclass(frozen=True)
class Example:
    """One layout of one of the shipped models.

    Attributes:
        model: name of its file in ``configs/``.
        gpus: ranks.
        keys: what is typed after ``--set``, beside the ZeRO stage.
        stage: of ZeRO.
        overlay: a second file of ``configs/``.
    """

    model: str
    gpus: int
    stage: int
    keys: tuple[str, ...] = ()
    overlay: str | None = field(default=None)


def _grid(tensor: int, pipe: int = 1, *more: str) -> tuple[str, ...]:
    sequence = "true" if tensor > 1 else "false"
    degrees = (f"model_parallel_size={tensor}", f"sequence_parallel={sequence}", f"pipe_parallel_size={pipe}")
    return (*degrees, *more)


ACCUMULATED = "train_batch_size=1536"
"""GPT-NeoX-20B's batch: with it a pipeline has micro-batches to fill its stages with."""

EXAMPLES = (
    Example("2-7B", 1, 1),
    Example("2-7B", 1, 3, overlay="offload"),
    Example("2-7B", 8, 1),
    Example("2-7B", 8, 3),
    Example("2-7B", 8, 1, _grid(2)),
    Example("20B", 8, 3),
    Example("20B", 32, 3),
    Example("20B", 8, 3, overlay="offload"),
    Example("20B", 32, 1, _grid(2, 4)),
    Example("20B", 96, 1, _grid(2, 4)),
    Example("20B", 32, 1, _grid(8)),
    Example("175B", 64, 3),
    Example("175B", 64, 3, overlay="offload"),
    Example("175B", 128, 1, _grid(8, 16, ACCUMULATED)),
    Example("175B", 512, 1, _grid(8, 16, ACCUMULATED)),
    Example("175B", 512, 3, _grid(8)),
)


def example_config(example: Example, configs: Path) -> Config:
    """The configuration of ``example``, its files in the folder ``configs``."""
    files = [configs / f"{name}.yml" for name in (example.model, example.overlay) if name]
    words = [f"zero_optimization.stage={example.stage}", "vocab_size=50257", *example.keys]
    return load_config(files, words, world_size=example.gpus)


def table(configs: Path) -> str:
    """The Markdown table of :data:`EXAMPLES`, in GB of 10^9 bytes for each GPU."""
    head = (
        "| model | GPUs | tensor x pipe x data | ZeRO | states | activations | all of a GPU | main memory |"
    )
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *_rows(configs)])


def _rows(configs: Path) -> Iterator[str]:
    for example in EXAMPLES:
        config = example_config(example, configs)
        estimate, parallel = estimate_memory(config, on_gpu=True), config.parallel
        grid = (
            parallel.model_parallel_size,
            max(parallel.pipe_parallel_size, 1),
            parallel.data_parallel_size,
        )
        cells = [
            f"{example.model} ({count_parameters(config) / 1e9:.1f}B)",
            str(example.gpus),
            " x ".join(map(str, grid)),
            f"{example.stage}, offloaded" if config.zero.offload_param else str(example.stage),
            *_sizes(estimate),
        ]
        yield "| " + " | ".join(cells) + " |"


def _sizes(estimate: MemoryEstimate) -> list[str]:
    sizes = [
        sum(estimate.device.get(part, 0) for part in STATES),
        sum(estimate.device.get(part, 0) for part in ACTIVATIONS),
        estimate.device_total,
        estimate.host_total,
    ]
    return [f"{size / 1e9:.1f}" for size in sizes]
