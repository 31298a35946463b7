"""Which network interface gloo talks through."""

from __future__ import annotations

import os
import socket

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"
DISCARD_PORT = 9
ELSEWHERE = "192.0.2.1"
"""An address of no host (RFC 5737): the way there is the way to everywhere."""


def choose_interface(meeting_host: str) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo's own choice would reach this machine only.

    gloo tells the other ranks the address that this machine's own name stands for. Debian's /etc/hosts says
    127.0.1.1, at which the ranks of other hosts wait for ever. Then it is the interface on the way to
    ``meeting_host``, or, on that host itself, to everywhere. What the user has set stays, and so does gloo's
    choice when all ranks are here (``meeting_host`` is 127.0.0.1) or there is no way to anywhere.
    """
    if VARIABLE in os.environ or _is_loopback(meeting_host) or not _is_own_name_loopback():
        return
    for target in (meeting_host, ELSEWHERE):
        name = _interface_towards(target)
        if name is not None:
            os.environ[VARIABLE] = name
            return


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _is_own_name_loopback() -> bool:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:  # the name stands for nothing: gloo takes the loopback address, too
        return True
    return _is_loopback(str(found[0][4][0]))


def _interface_towards(host: str) -> str | None:
    """The name of the interface from which packets to ``host`` leave, unless they stay on this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, DISCARD_PORT))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    if _is_loopback(own):
        return None
    names = (
        name for name, all_of_it in psutil.net_if_addrs().items() for each in all_of_it if each.address == own
    )
    return next(names, None)
