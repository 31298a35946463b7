"""A keyed shuffle of ``range(size)`` that needs no table: position → element in constant time and memory.

A Feistel network over pairs of digits in base ⌈√size⌉ permutes a square that is hardly larger than
``size``; cycle walking (apply again while the result lies outside) cuts it down to ``range(size)``.
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

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


CHUNK_BYTES = 1 << 20
"""Neighbours on disk that are read together. A disk reads as much in the time of one seek."""

POOL_CHUNKS = 256
"""Chunks that are shuffled together: the shuffle needs their bytes in the page cache, 256 MiB."""


class ChunkedShuffle:
    """The permutation of ``range(size)`` of one epoch, made so that whoever follows it reads in chunks.

    ``chunk`` neighbours are a chunk. The chunks are shuffled and taken in pools of some ``pool`` chunks from
    anywhere, and the elements of a pool are shuffled among themselves: a pool is read once, chunk by chunk,
    and then lies in memory until it is used up. What is smaller than two pools is shuffled as a whole.
    """

    def __init__(self, size: int, chunk: int, key: int, pool: int = POOL_CHUNKS) -> None:
        self.size = size
        self._chunk = chunk
        self._key = key
        self._chunks = size // chunk
        self._pools = max(1, self._chunks // pool)
        self._chunk_order = KeyedPermutation(max(1, self._chunks), derive_seed(key, "chunks"))
        self._pool = -1
        self._enter(0)

    def __call__(self, position: int) -> int:
        """The element at ``position``, 0 ≤ position < size."""
        assert 0 <= position < self.size, f"position {position} is outside range({self.size})"
        if self._pools == 1:
            return self._order(position)
        chunk = min(position // self._chunk, self._chunks - 1)
        pool = ((chunk + 1) * self._pools - 1) // self._chunks
        if pool != self._pool:
            self._enter(pool)
        place = self._order(position - self._first * self._chunk)
        chunk, offset = divmod(place + self._first * self._chunk, self._chunk)
        if chunk < self._chunks:  # else of the rest after the last whole chunk, which is in the last pool
            chunk = self._chunk_order(chunk)
        return chunk * self._chunk + offset

    def _enter(self, pool: int) -> None:
        """Make ``pool`` the current one: chunks ``_first`` … of the shuffled chunks."""
        self._first = pool * self._chunks // self._pools
        last = (pool + 1) * self._chunks // self._pools
        end = self.size if pool == self._pools - 1 else last * self._chunk
        key = self._key if self._pools == 1 else derive_seed(self._key, "pool", pool)
        self._order = KeyedPermutation(end - self._first * self._chunk, key)
        self._pool = pool


LARGEST_POOL = 1 << 20
"""Elements of a pool that is worked out as an array, unless one chunk has more: some 40 MB in passing."""


class PooledShuffle:
    """A shuffled order of ``range(size)``, of which whole pools are asked for: each an array.

    As with :class:`ChunkedShuffle`, pools are chunks of ``chunk`` neighbours from anywhere, and the elements
    of a pool are shuffled among themselves: sorted by a hash, 0.1 s for a million.

    Attributes:
        pools: how many there are.
    """

    def __init__(self, size: int, chunk: int, key: int) -> None:
        self._size = size
        self._chunk = chunk
        self._key = key
        self._chunks = size // chunk
        self.pools = max(1, self._chunks // min(POOL_CHUNKS, max(1, LARGEST_POOL // chunk)))
        self._chunk_order = KeyedPermutation(max(1, self._chunks), derive_seed(key, "chunks"))

    def __call__(self, pool: int) -> np.ndarray:
        """The elements of ``pool``, shuffled: int64."""
        places = range(pool * self._chunks // self.pools, (pool + 1) * self._chunks // self.pools)
        chunks = np.array([self._chunk_order(place) for place in places], np.int64)
        elements = (chunks[:, None] * self._chunk + np.arange(self._chunk)).ravel()
        if pool == self.pools - 1:
            elements = np.append(elements, np.arange(self._chunks * self._chunk, self._size))
        return elements[np.argsort(mix_each(elements, derive_seed(self._key, "elements")), kind="stable")]


def mix_each(values: np.ndarray, key: int) -> np.ndarray:
    """:func:`mix` of the sum of each of ``values`` (int64) and ``key``: uint64."""
    mixed = values.astype(np.uint64) + np.uint64(key & MASK)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Epochs:
    """``range(size)`` again and again, each time shuffled anew (see :class:`ChunkedShuffle`)."""

    def __init__(self, size: int, chunk: int, seed: int, pool: int = POOL_CHUNKS) -> None:
        self.size = size
        self._chunk = chunk
        self._pool = pool
        self._seed = seed
        self._epoch = -1

    def __call__(self, sample: int) -> int:
        """The element for ``sample`` ≥ 0, counted through the epochs."""
        epoch, position = divmod(sample, self.size)
        if epoch != self._epoch:
            key = derive_seed(self._seed, "epoch", epoch)
            self._shuffle = ChunkedShuffle(self.size, self._chunk, key, self._pool)
            self._epoch = epoch
        return self._shuffle(position)
