"""One rank of training: ``python train.py CONF.yml [MORE.yml ...] [--set KEY=VALUE ...]``.

Starts alone as one rank, or as one of many under ``deepy.py``, ``torchrun``, ``srun`` or ``mpirun``.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys

from megatron_lite.config import load_config
from megatron_lite.config.cli import is_launched, parse_command_line
from megatron_lite.data.prepare import prepare_data
from megatron_lite.launcher.plan import run_summary
from megatron_lite.launcher.torch_build import usable
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.planner import this_machine
from megatron_lite.training.run import train
from megatron_lite.utils.errors import command_line
from megatron_lite.utils.log import setup_logging
from megatron_lite.utils.streams import outlive_readers


@command_line
def main() -> int:
    """Read the configuration, get the data ready, train."""
    faulthandler.enable()  # a crash in C code shows the Python stack, too
    paths, overrides = parse_command_line("Train a GPT-like language model: one rank of the run.")
    context = context_from_environment()
    setup_logging(logging.WARNING if is_launched() else logging.INFO)  # deepy.py has told what follows
    config = prepare_data(load_config(paths, overrides, world_size=context.world_size))
    if context.is_first and not is_launched():
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))
        machine = usable(this_machine())
        print(run_summary(config, machine, ranks_here, ranks_here < context.world_size), flush=True)
    setup_logging()
    return train(config, context)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
