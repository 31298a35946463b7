"""Ports for runs that must be told one."""

from __future__ import annotations

import os
import socket
from itertools import count

FIRST, NUMBER = 20_000, 9_000
"""Below those that systems hand out to whoever asks for any (Linux from 32768 on): another test's connections
would take such a port before the run, which needs seconds to begin, listens there."""

_turns = count()


def free_port() -> int:
    """A port that nobody has; processes with numbers close to each other get others."""
    while True:
        port = FIRST + (89 * os.getpid() + next(_turns)) % NUMBER
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
