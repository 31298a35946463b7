"""Which dataset gives sample *i* of a weighted blend, without a table.

The datasets hang on a binary tree (Huffman's, by weight). At a node whose left branch has the share p of the
weight, the first n samples of the node hold round(n·p) of the left branch: one comparison tells which way
sample n goes and how many went that way before. So a sample costs O(log datasets), nothing is stored that
grows with the samples, and after any n samples each dataset has given n·weight of them, less than 2 off.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from megatron_lite.utils.errors import DataError

WEIGHT_UNITS = 1 << 40
"""Weights are held as integers that add up to about this, so that counting is exact for any n."""


@dataclass(frozen=True)
class Branch:
    """A node of the tree: its two children (a dataset's number, or a branch), and their weights."""

    left: Branch | int
    right: Branch | int
    left_weight: int
    weight: int

    def left_count(self, n: int) -> int:
        """How many of the node's first ``n`` samples are the left child's: n·left_weight/weight, rounded."""
        return (2 * n * self.left_weight + self.weight) // (2 * self.weight)


def huffman_tree(weights: Sequence[int]) -> Branch | int:
    """The tree over datasets 0, 1, … with these positive weights; heavy datasets hang near the root."""
    order = count()
    heap: list[tuple[int, int, Branch | int]] = [
        (weight, next(order), number) for number, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        left_weight, _, left = heapq.heappop(heap)
        right_weight, _, right = heapq.heappop(heap)
        weight = left_weight + right_weight
        heapq.heappush(heap, (weight, next(order), Branch(left, right, left_weight, weight)))
    return heap[0][2]


class Blend:
    """The assignment of samples 0, 1, 2, … to datasets in proportion to ``weights`` (need not add up to 1).

    Raises:
        DataError: a weight is not a positive finite number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise DataError(
                    f"the weight {weight} of a dataset is not a positive number: leave the dataset out or "
                    "correct the data weights"
                )
        self._root = huffman_tree([max(1, round(weight / total * WEIGHT_UNITS)) for weight in weights])

    def locate(self, sample: int) -> tuple[int, int]:
        """(dataset, how many earlier samples that dataset gave) for ``sample`` ≥ 0."""
        node = self._root
        while isinstance(node, Branch):
            before = node.left_count(sample)
            if node.left_count(sample + 1) > before:
                node, sample = node.left, before
            else:
                node, sample = node.right, sample - before
        return node, sample
