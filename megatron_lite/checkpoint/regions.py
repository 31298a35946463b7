"""Where the elements of a tensor-parallel rank's part are in the whole tensor, and in another rank's part.

A part (a :class:`Region`) is some ranges of indices of one dimension. Seen from that dimension every tensor
is a matrix, [what comes before, the dimension and what comes after]; a run of a part's flattened elements is
a few rectangles of that matrix, and so is what two runs have in common. Copying it takes one strided copy a
rectangle, however many rows it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """Ranges ``(start, stop)`` of indices of dimension ``dim``, laid end to end."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Number of indices."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Block:
    """A rectangle of the whole matrix, and where it is in a run of elements.

    Attributes:
        rows: first row and one past the last.
        columns: first column and one past the last.
        offset: where the run has the rectangle's first element.
        stride: elements of the run from one row to the next.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int
    stride: int


@dataclass(frozen=True)
class Overlap:
    """A rectangle of ``rows`` x ``columns`` that two runs have; for each its (offset, stride)."""

    rows: int
    columns: int
    first: tuple[int, int]
    second: tuple[int, int]


def elements(shape: tuple[int, ...], region: Region | None) -> int:
    """Number of elements of the part of a tensor of ``shape``."""
    return math.prod(shape) if region is None else math.prod(shape) // shape[region.dim] * region.length


def blocks(shape: tuple[int, ...], dim: int, region: Region | None, start: int, stop: int) -> list[Block]:
    """Elements ``start`` … ``stop - 1`` of the flattened part of a tensor of ``shape`` divided along ``dim``.

    At most three rectangles for each range of the part: the end of a row, whole rows, the start of one.
    """
    ranges = ((0, shape[dim] if shape else 1),) if region is None else region.ranges
    inner = math.prod(shape[dim + 1 :])
    width = sum(b - a for a, b in ranges) * inner
    found = []
    for rows, columns in _segments(width, start, stop):
        place = 0
        for first, last in ranges:
            low, high = max(columns[0], place), min(columns[1], place + (last - first) * inner)
            if low < high:
                whole = first * inner + low - place
                offset = rows[0] * width + low - start
                found.append(Block(rows, (whole, whole + high - low), offset, width))
            place += (last - first) * inner
    return found


def _segments(width: int, start: int, stop: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Elements ``start`` … ``stop - 1`` of a flattened matrix as (rows, columns)."""
    if start >= stop:
        return
    row, column = divmod(start, width)
    last, end = divmod(stop, width)
    if row == last:
        yield (row, row + 1), (column, end)
        return
    if column:
        yield (row, row + 1), (column, width)
        row += 1
    if row < last:
        yield (row, last), (0, width)
    if end:
        yield (last, last + 1), (0, end)


def overlap(first: Block, second: Block) -> Overlap | None:
    """What two rectangles have in common."""
    row, row_stop = max(first.rows[0], second.rows[0]), min(first.rows[1], second.rows[1])
    column = max(first.columns[0], second.columns[0])
    column_stop = min(first.columns[1], second.columns[1])
    if row >= row_stop or column >= column_stop:
        return None

    def place(block: Block) -> tuple[int, int]:
        down, right = row - block.rows[0], column - block.columns[0]
        return block.offset + down * block.stride + right, block.stride

    return Overlap(row_stop - row, column_stop - column, place(first), place(second))
