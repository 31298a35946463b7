"""One host of several, which :mod:`megatron_lite.launcher.ssh` starts.

The first line of standard input says what to run (:class:`HostOrder`, as JSON), each further one names a
signal for it. So no shell reads a word of it; and at the end of the input, when the launcher or the
connection to it is gone, the ranks are asked to save and end.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lite.launcher.environment import rank_environment
from megatron_lite.launcher.local import POLL_SECONDS, Share, end_with_parent, start_ranks
from megatron_lite.launcher.torch_build import usable
from megatron_lite.planner import this_machine
from megatron_lite.utils.errors import ConfigError, command_line
from megatron_lite.utils.log import setup_logging
from megatron_lite.utils.streams import outlive_readers


@dataclass(frozen=True)
class HostOrder:
    """What a host is to run.

    Attributes:
        name: the host's, for messages.
        command: the words that start a rank.
        environment: variables for the ranks, beside those of the host.
        slots: indices of its accelerators, one rank each.
        chosen: whether the slots were picked by name, so that the ranks must be shown these and no others.
        first: number of the first of its ranks.
        world_size: ranks of the whole run.
        address: where all ranks meet.
        port: the port there.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    slots: Sequence[int]
    chosen: bool
    first: int
    world_size: int
    address: str
    port: int


def main() -> int:
    """Start the ranks and hand signals on; return the exit status of this host's part of the run."""
    outlive_readers()  # sshd may be killed
    orders = io.FileIO(0, closefd=False)  # without a buffer: a line is read when it is there
    order = HostOrder(**json.loads(orders.readline()))
    process = os.fork()
    if process == 0:
        end_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os._exit(_flushed(command_line(_start)(order)))
    listens = True
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        if not listens:
            time.sleep(POLL_SECONDS)
        elif select.select([0], [], [], POLL_SECONDS)[0]:
            name = orders.readline().decode().strip()
            os.kill(process, signal.Signals[name] if name else signal.SIGTERM)
            listens = bool(name)


def _start(order: HostOrder) -> int:
    setup_logging()
    os.environ.update(order.environment)  # first: the slots are those of the GPUs that it shows
    machine: Any = usable(this_machine())
    if machine.gpus and max(order.slots) >= len(machine.gpus):
        raise ConfigError(
            f"slot {max(order.slots)} of {order.name}: {len(machine.gpus)} GPUs are visible there"
        )
    environment = rank_environment(machine, len(order.slots), order.slots if order.chosen else None)
    share = Share(order.first, order.world_size, order.address, order.port)
    return start_ranks(order.command, len(order.slots), environment, share=share)


def _flushed(status: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return status
