"""Transforms invert each other, and put the rows where the definition says."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.hf.transforms import PLAIN, Heads, Interleaved, Joined, Stacked, Transform, Transposed

HEADS = {
    f"{kv} key heads, {queries} queries each": Heads(kv, queries, 4)
    for kv, queries in ((6, 1), (3, 2), (1, 6))
}
TRANSFORMS: dict[str, tuple[Transform, int]] = {  # and rows of ours
    "plain": (PLAIN, 12),
    "gate, up": (Stacked(2), 12),
    "three parts": (Stacked(3), 12),
    "transposed": (Transposed(), 12),
    "transposed parts": (Transposed(Stacked(2)), 12),
    "GPT-2": (Transposed(Joined(Heads(3, 1, 4), (12, 12, 12))), 36),
    "joined": (Joined(Heads(2, 3, 4), (24, 8, 8)), 40),
    "GPT-J": (Interleaved(Heads(3, 1, 6), 4), 54),
    **{name: (heads, (heads.queries_per_key + 2) * heads.kv_heads * 4) for name, heads in HEADS.items()},
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("columns", [(5,), ()], ids=["weight", "bias"])
def test_each_inverts_the_other(name: str, columns: tuple[int, ...]) -> None:
    transform, rows = TRANSFORMS[name]
    ours = torch.randn(rows, *columns, generator=torch.Generator().manual_seed(0))
    theirs = transform.to_theirs(ours)
    assert sum(tensor.numel() for tensor in theirs) == ours.numel()
    assert torch.equal(transform.to_ours(theirs), ours)
    shapes = [tensor.shape for tensor in transform.to_theirs(ours.to("meta"))]
    assert shapes == [tensor.shape for tensor in theirs]
    again = transform.to_theirs(transform.to_ours([torch.randn(shape) for shape in shapes]))
    assert [tensor.shape for tensor in again] == shapes


def test_rows_of_grouped_heads() -> None:
    """For each key head: its query heads, the key head, the value head; here heads are of one row."""
    ours = torch.tensor([0, 1, 100, 200, 2, 3, 101, 201])
    queries, keys, values = Heads(kv_heads=2, queries_per_key=2, size=1).to_theirs(ours)
    assert queries.tolist() == [0, 1, 2, 3]
    assert keys.tolist() == [100, 101]
    assert values.tolist() == [200, 201]


def test_rows_of_one_joined_matrix() -> None:
    """[all queries; all keys; all values], transposed."""
    ours = torch.tensor([[0.0], [10.0], [20.0], [1.0], [11.0], [21.0]])
    (theirs,) = Transposed(Joined(Heads(2, 1, 1), (2, 2, 2))).to_theirs(ours)
    assert theirs.tolist() == [[0.0, 1.0, 10.0, 11.0, 20.0, 21.0]]


def test_rows_that_rotate_as_a_pair() -> None:
    """Of a head of five rows four rotate: here the first with the third, there the first with the second."""
    ours = torch.tensor([0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24])
    queries, keys, values = Interleaved(Heads(1, 1, 5), 4).to_theirs(ours)
    assert queries.tolist() == [0, 2, 1, 3, 4]
    assert keys.tolist() == [10, 12, 11, 13, 14]
    assert values.tolist() == [20, 21, 22, 23, 24]
