"""What the tools that ask a trained model have in common: which model, on how many ranks, where to write."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config import Config, load_config
from megatron_lite.config.cli import SUFFIXES
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import ConfigError


def positive(text: str) -> int:
    """The whole number above 0 that ``text`` is."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a checkpoint or YAML files, and how the model is loaded, to ``parser``."""
    parser.add_argument(
        "of", nargs="+", type=Path, help="a checkpoint, a folder of checkpoints, or YAML files"
    )
    parser.add_argument("--iteration", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--model-parallel-size", type=positive, help="ranks that share the model")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (default: the run's on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


@dataclass(frozen=True)
class ChosenModel:
    """The model that a command line names.

    Attributes:
        checkpoint: a checkpoint, or a folder of them.
        step: which one in the folder; None: the latest.
        tensor_ranks: how many ranks share the model.
        config: the configuration that named it, if one did.
    """

    checkpoint: Path
    step: int | None
    tensor_ranks: int
    config: Config | None = None


def choose_model(arguments: argparse.Namespace, world_size: int) -> ChosenModel:
    """From the command line alone, or from a configuration and what the command line says otherwise.

    The keys are ``load``, or else ``save``, ``iteration`` and ``model_parallel_size``.

    Raises:
        ConfigError: a key is wrong, or the words name no one model.
    """
    first, step, tensor_ranks = arguments.of[0], arguments.iteration, arguments.model_parallel_size
    if first.suffix not in SUFFIXES:
        if len(arguments.of) > 1 or arguments.overrides:
            raise ConfigError(f"{first} is not a YAML file: give one checkpoint, or YAML files only")
        return ChosenModel(first, step, tensor_ranks or 1)
    config = load_config(arguments.of, arguments.overrides, world_size=world_size)
    folder = config.checkpoint.load or config.checkpoint.save
    if folder is None:
        raise ConfigError("load is not given: say which checkpoint is meant")
    return ChosenModel(
        Path(folder),
        config.checkpoint.iteration if step is None else step,
        tensor_ranks or config.parallel.model_parallel_size,
        config,
    )


def prepare_output(path: Path) -> None:
    """Make the folder of ``path``, before hours of work; :class:`ConfigError` when ``path`` is one itself."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file for the output")
    path.parent.mkdir(parents=True, exist_ok=True)
