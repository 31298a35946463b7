"""Random numbers that depend on what they are for, not on who draws them or when."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose ``names`` of the run with ``seed``.

    Equal on every machine and Python version (``hash()`` is neither). 63 bits: torch's and numpy's seeds are
    happiest non-negative.

    >>> derive_seed(1234, "dropout", 0) != derive_seed(1234, "dropout", 1)
    True
    """
    text = "\0".join(str(part) for part in (seed, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
