"""A keyed shuffle of ``range(size)`` that needs no table: position → element in constant time and memory.

A Feistel network over pairs of digits in base ⌈√size⌉ permutes a square that is hardly larger than
``size``; cycle walking (apply again while the result lies outside) cuts it down to ``range(size)``.
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

from __future__ import annotations

from math import isqrt

from megatron_lite.utils.seeds import derive_seed

ROUNDS = 8
"""Four make a Feistel network pseudorandom in theory; small domains gain from more."""

MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """64 bits scattered: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class KeyedPermutation:
    """The permutation of ``range(size)`` that belongs to ``key``; ``permutation(i)`` is its element i."""

    def __init__(self, size: int, key: int) -> None:
        assert size > 0, "a permutation needs elements"
        self.size = size
        self._base = isqrt(size - 1) + 1
        self._round_keys = [derive_seed(key, "round", number) for number in range(ROUNDS)]

    def __call__(self, position: int) -> int:
        """The element at ``position``, 0 ≤ position < size."""
        assert 0 <= position < self.size, f"position {position} is outside range({self.size})"
        element = self._permute_square(position)
        # The square has fewer than size + 2·√size + 1 elements: a second round is rare.
        while element >= self.size:
            element = self._permute_square(element)
        return element

    def _permute_square(self, element: int) -> int:
        left, right = divmod(element, self._base)
        for key in self._round_keys:
            left, right = right, (left + mix((right + key) & MASK)) % self._base
        return left * self._base + right
