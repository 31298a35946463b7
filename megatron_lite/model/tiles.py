"""Which queries see which keys, as rectangles: attention's mask without a mask.

A token sees its own document's tokens, those up to itself or, in both directions, all of them; where there
is a ``window``, only those less than so many places away. What the queries of a rank see is cut into tiles,
each a rectangle of scores with at most two straight borders, which kernels know how to compute: no matrix of
all pairs is ever made.

A tile's borders are aligned to its lower right corner, as in flash-attn (its window_size is left, right)::

              keys         keys                keys                keys        keys
    queries   x . . .      x . . .             x x . .             x x x x     x x x
              x x . .      x x . .             x x x .             x x x x     . x x
              x x x .      . x x .             . x x x
              x x x x      . . x x             . . x x
              right 0      left 1, right 0     left 1, right 1     neither     left 1

A tile with a border has at most as many queries as keys, n. For torch's flash kernel on CUDA a border of n
places or more is none, and a left border alone has a right one of n places beside it (flash_api.cpp: mha_fwd,
set_params_fprop): both are the same only then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

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
        left: ... if y >= x + n - m - left; None: from the first.
        right: ... and y <= x + n - m + right; None: to the last. 0 is what kernels call causal.
    """

    queries: int
    keys: int
    left: int | None
    right: int | None


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores, in which each query sees at least one key.

    Attributes:
        rows: of the micro-batch.
        queries: of this rank.
        keys: of those at hand in the tile's step.
        shape: what is seen in it.
        diagonal: whether its keys are those of its queries. Each query is in exactly one such tile.
    """

    rows: slice
    queries: slice
    keys: slice
    shape: Shape
    diagonal: bool


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
def whole_plan(length: int, bounds: Bounds | None, window: int | None, causal: bool) -> tuple[Step, ...]:
    """The one step of attention over whole sequences; ``bounds`` of their documents, None: one a row."""
    everything = slice(0, length)
    tiles = _tiles([range(length)], [range(length)], bounds, window, causal)
    return (Step(tiles, 0, 0, everything, everything),)


@lru_cache(maxsize=64)
def ring_plan(
    length: int, ranks: int, rank: int, bounds: Bounds | None, window: int | None, causal: bool
) -> tuple[Step, ...]:
    """What ``rank`` of ``ranks`` does in ring attention over sequences of ``length``.

    In step t it works on the keys of the rank t places before it, which sends of them what is seen here and
    nothing else: if causal often half of them, with windows or short documents less or none.
    """
    runs = [token_runs(length, ranks, each, ring=True) for each in range(ranks)]
    own = slice(0, length // ranks)
    steps = [Step(_tiles(runs[rank], runs[rank], bounds, window, causal), rank, rank, own, own)]
    for distance in range(1, ranks):
        origin, to = (rank - distance) % ranks, (rank + distance) % ranks
        tiles = _tiles(runs[rank], runs[origin], bounds, window, causal)
        received = _span(tiles)
        sent = _span(_tiles(runs[to], runs[rank], bounds, window, causal))
        steps.append(Step(_shifted(tiles, received.start), origin, to, received, sent))
    return tuple(steps)


def blocks(shape: Shape, most: int) -> Iterator[tuple[slice, slice, Shape]]:
    """``shape`` in runs of at most ``most`` queries, each with the keys that it sees and its own shape."""
    return _runs(shape, range(0, shape.queries, most))


def _runs(shape: Shape, begins: Sequence[int]) -> Iterator[tuple[slice, slice, Shape]]:
    """``shape`` in runs of queries that begin with those in ``begins``."""
    m, n, left, right = shape.queries, shape.keys, shape.left, shape.right
    for first, last in pairwise((*begins, m)):
        begin = 0 if left is None else max(0, first + n - m - left)
        end = n if right is None else min(n, last + n - m + right)
        moved = end - (last + n - m)  # the corner of the part, from where the whole one's borders put it
        part = _shape(
            last - first, end - begin,
            None if left is None else left + moved, None if right is None else right - moved,
        )  # fmt: skip
        yield slice(first, last), slice(begin, end), part


def _without_long_borders(shape: Shape) -> Iterator[tuple[slice, slice, Shape]]:
    """``shape`` in runs of queries that are no more than their keys, or see all of them.

    A border crosses n - 1 queries at most: those before and behind it are cut off.
    """
    m, n = shape.queries, shape.keys
    begins = {0}
    if m > n and shape.right is not None:
        begins.add(m - 1 - shape.right)  # the first that sees the last key
    if m > n and shape.left is not None:
        begins.add(m - n + shape.left + 1)  # the first that does not see the first key
    return _runs(shape, sorted(begins))


def _shape(queries: int, keys: int, left: int | None, right: int | None) -> Shape:
    """A shape whose borders are None where they hide nothing."""
    return Shape(
        queries,
        keys,
        None if left is not None and left >= keys - 1 else left,
        None if right is not None and right >= queries - 1 else right,
    )


def _tiles(
    queries: Sequence[range], keys: Sequence[range], bounds: Bounds | None, window: int | None, causal: bool
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
                    own, theirs = _overlap(query_run, document), _overlap(key_run, document)
                    seen = _seen(own, theirs, window, causal)
                    if not seen:
                        continue
                    for run, columns, shape in _without_long_borders(seen[2]):
                        there = _moved(seen[0][run], query_offset), _moved(seen[1][columns], key_offset)
                        tiles.append(Tile(row, *there, shape, own == theirs))
    return tuple(sorted(tiles, key=lambda tile: not tile.diagonal))


def _seen(queries: range, keys: range, window: int | None, causal: bool) -> tuple[range, range, Shape] | None:
    """What ``queries`` see of ``keys``, places in one document: the same ones, or others."""
    if not queries or not keys or (causal and keys.start > queries.start):
        return None
    if window is not None:
        near = range(max(keys.start, queries.start - window + 1), min(keys.stop, queries.stop + window - 1))
        queries = range(
            max(queries.start, keys.start - window + 1), min(queries.stop, keys.stop + window - 1)
        )
        keys = near
    if not queries or not keys:
        return None
    beyond = keys.stop - queries.stop
    left = None if window is None else window - 1 + beyond
    right = None if window is None else window - 1 - beyond
    if causal and keys == queries:
        right = 0
    return queries, keys, _shape(len(queries), len(keys), left, right)


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
