"""Which queries see which keys, as rectangles: attention's mask without a mask.

A token sees its own document's tokens up to itself, and of them the last ``window`` where there is one. What
the queries of a rank see is cut into tiles, each a rectangle of scores with at most two straight borders,
which kernels know how to compute: no matrix of all pairs is ever made.

A tile's borders are aligned to its lower right corner, as in flash-attn (``left`` is its window_size)::

              keys           keys             keys              keys
    queries   x . . .        x . . .          x x x x           x x x
              x x . .        x x . .          x x x x           . x x
              x x x .        . x x .
              x x x x        . . x x
              causal         causal, left 1   everything        left 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_lite.model.places import Bounds
from megatron_lite.parallel.sequence import token_runs

EVERY_ROW = slice(None)
NOTHING = slice(0, 0)


@dataclass(frozen=True)
class Shape:
    """Which of its keys each query of a tile sees: with m queries and n keys, query x sees key y ...

    Attributes:
        queries: m.
        keys: n.
        causal: ... if y <= x + n - m.
        left: ... and y >= x + n - m - left; None: from the first.
    """

    queries: int
    keys: int
    causal: bool
    left: int | None


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores.

    Attributes:
        rows: of the micro-batch.
        queries: of this rank.
        keys: of those at hand in the tile's step.
        shape: what is seen in it. Causal tiles lie on the diagonal: each query is in exactly one of them.
    """

    rows: slice
    queries: slice
    keys: slice
    shape: Shape


@dataclass(frozen=True)
class Step:
    """The tiles of the keys of one rank.

    Attributes:
        tiles: what this rank computes.
        origin: whose keys these are.
        to: the rank that gets this one's keys meanwhile.
        received: which of the origin's keys come.
        sent: which of this rank's keys go.
    """

    tiles: tuple[Tile, ...]
    origin: int
    to: int
    received: slice
    sent: slice


@lru_cache(maxsize=64)  # all layers of a micro-batch ask for the same few, and ask again when recomputed
def whole_plan(length: int, bounds: Bounds | None, window: int | None) -> tuple[Step, ...]:
    """The one step of attention over whole sequences; ``bounds`` of their documents, None: one a row."""
    everything = slice(0, length)
    tiles = _tiles([range(length)], [range(length)], bounds, window)
    return (Step(tiles, 0, 0, everything, everything),)


@lru_cache(maxsize=64)
def ring_plan(
    length: int, ranks: int, rank: int, bounds: Bounds | None, window: int | None
) -> tuple[Step, ...]:
    """What ``rank`` of ``ranks`` does in ring attention over sequences of ``length``.

    In step t it works on the keys of the rank t places before it, which sends of them what is seen here and
    nothing else: often half of them, with windows or short documents less or none.
    """
    runs = [token_runs(length, ranks, each, ring=True) for each in range(ranks)]
    own = slice(0, length // ranks)
    steps = [Step(_tiles(runs[rank], runs[rank], bounds, window), rank, rank, own, own)]
    for distance in range(1, ranks):
        origin, to = (rank - distance) % ranks, (rank + distance) % ranks
        tiles = _tiles(runs[rank], runs[origin], bounds, window)
        received = _span(tiles)
        sent = _span(_tiles(runs[to], runs[rank], bounds, window))
        steps.append(Step(_shifted(tiles, received.start), origin, to, received, sent))
    return tuple(steps)


def blocks(shape: Shape, most: int) -> Iterator[tuple[slice, slice, Shape]]:
    """``shape`` in runs of at most ``most`` queries, each with the keys that it sees and its own shape."""
    m, n, left = shape.queries, shape.keys, shape.left
    for first in range(0, m, most):
        last = min(first + most, m)
        begin = 0 if left is None else max(0, first + n - m - left)
        end = last + n - m if shape.causal else n
        rest = None if left is None else left + (0 if shape.causal else m - last)
        part = _shape(last - first, end - begin, shape.causal, rest)
        yield slice(first, last), slice(begin, end), part


def _shape(queries: int, keys: int, causal: bool, left: int | None) -> Shape:
    """A shape whose ``left`` is None where it hides nothing."""
    return Shape(queries, keys, causal, None if left is not None and left >= keys - 1 else left)


def _tiles(
    queries: Sequence[range], keys: Sequence[range], bounds: Bounds | None, window: int | None
) -> tuple[Tile, ...]:
    """The tiles between runs of places, those on the diagonal first."""
    longest = max(run.stop for run in (*queries, *keys))
    rows = (
        [(EVERY_ROW, (0, longest))]
        if bounds is None
        else [(slice(i, i + 1), b) for i, b in enumerate(bounds)]
    )
    tiles = []
    for row, places in rows:
        for document in map(range, places[:-1], places[1:]):
            for query_run, query_offset in _with_offsets(queries):
                for key_run, key_offset in _with_offsets(keys):
                    seen = _seen(_overlap(query_run, document), _overlap(key_run, document), window)
                    if seen:
                        own, theirs, shape = seen
                        tiles.append(Tile(row, _moved(own, query_offset), _moved(theirs, key_offset), shape))
    return tuple(sorted(tiles, key=lambda tile: not tile.shape.causal))


def _seen(queries: range, keys: range, window: int | None) -> tuple[range, range, Shape] | None:
    """What ``queries`` see of ``keys``, places in one document: the same ones, or others."""
    if not queries or not keys or keys.start > queries.start:
        return None
    causal = keys == queries
    if window is None:
        return queries, keys, Shape(len(queries), len(keys), causal, None)
    keys = range(max(keys.start, queries.start - window + 1), keys.stop)
    queries = range(queries.start, min(queries.stop, keys.stop - 1 + window))
    if not queries or not keys:
        return None
    left = keys.stop - queries.stop + window - 1
    return queries, keys, _shape(len(queries), len(keys), causal, left)


def _overlap(run: range, document: range) -> range:
    return range(max(run.start, document.start), min(run.stop, document.stop))


def _with_offsets(runs: Sequence[range]) -> Iterator[tuple[range, int]]:
    """Each run, and what is to be added to its places for a place among all runs, laid end to end."""
    first = 0
    for run in runs:
        yield run, first - run.start
        first += len(run)


def _moved(places: range, offset: int) -> slice:
    return slice(places.start + offset, places.stop + offset)


def _span(tiles: Sequence[Tile]) -> slice:
    """The keys of ``tiles``, and what lies between."""
    if not tiles:
        return NOTHING
    return slice(min(tile.keys.start for tile in tiles), max(tile.keys.stop for tile in tiles))


def _shifted(tiles: Sequence[Tile], first: int) -> tuple[Tile, ...]:
    """``tiles`` where the keys at hand begin with the key ``first``."""
    return tuple(replace(tile, keys=slice(tile.keys.start - first, tile.keys.stop - first)) for tile in tiles)
