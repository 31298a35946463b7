"""The command line that ``deepy.py`` and ``train.py`` share: configuration files, their folder, overrides."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

SUFFIXES = (".yml", ".yaml", ".json")

COMMAND_VARIABLE = "MEGATRON_LITE_COMMAND"
"""Environment variable by which a launcher tells its ranks the command that was typed."""


def typed_command() -> str:
    """The command that started this run, for messages that tell how to go on."""
    return os.environ.get(COMMAND_VARIABLE) or shlex.join(["python", *sys.argv])


def is_launched() -> bool:
    """Whether this is a rank that ``deepy.py`` started, which has checked and described the run."""
    return COMMAND_VARIABLE in os.environ


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``CONF [CONF ...]``, ``-d CONF_DIR`` and ``--set KEY=VALUE ...`` to ``parser``."""
    parser.add_argument(
        "config_files",
        metavar="CONF",
        nargs="+",
        help="YAML files; later ones override earlier ones; `.yml` may be left off",
    )
    parser.add_argument(
        "-d",
        "--conf_dir",
        metavar="CONF_DIR",
        type=Path,
        default=None,
        help="folder that the files are in (default: the current one)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override keys of the files, e.g. --set train-iters=100 optimizer.params.lr=1e-3",
    )


def config_paths(names: list[str], folder: Path | None = None) -> list[Path]:
    """The files that ``names`` stand for: within ``folder``, with ``.yml`` added unless a suffix is there."""
    return [(folder or Path()) / (name if name.endswith(SUFFIXES) else f"{name}.yml") for name in names]


def parse_command_line(description: str, arguments: list[str] | None = None) -> tuple[list[Path], list[str]]:
    """Paths and overrides of ``PROGRAM CONF [CONF ...] [-d CONF_DIR] [--set KEY=VALUE ...]``.

    ``arguments`` defaults to ``sys.argv[1:]``. ``--local_rank=N``, which some launchers add, is accepted and
    ignored: ranks come from the environment.
    """
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return config_paths(options.config_files, options.conf_dir), options.overrides
