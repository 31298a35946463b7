"""Any part of a tensor out of any other parts of it, against plain indexing."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_lite.checkpoint import files
from megatron_lite.checkpoint.files import _copy
from megatron_lite.checkpoint.index import Piece, TensorEntry, _covers
from megatron_lite.checkpoint.regions import Region, blocks, elements, overlap

SHAPES = [(12,), (12, 5), (5, 12), (2, 12, 3)]


def parts(dim: int, ranks: int, interleaved: bool) -> list[Region | None]:
    """A dimension of 12 over ``ranks``: in one range each, or in two ([gate; up])."""
    if ranks == 1:
        return [None]
    half, share = 6, 6 // ranks
    if interleaved:
        return [
            Region(dim, tuple((p * half + r * share, p * half + (r + 1) * share) for p in (0, 1)))
            for r in range(ranks)
        ]
    return [Region(dim, ((r * 2 * share, (r + 1) * 2 * share),)) for r in range(ranks)]


def take(whole: torch.Tensor, region: Region | None) -> torch.Tensor:
    if region is None:
        return whole.flatten()
    return torch.cat([whole.narrow(region.dim, a, b - a) for a, b in region.ranges], region.dim).flatten()


def cuts(length: int, count: int, source: random.Random) -> list[tuple[int, int]]:
    """``length`` elements in up to ``count`` runs."""
    inner = sorted({source.randrange(1, length) for _ in range(count - 1)}) if length > 1 else []
    return list(zip([0, *inner], [*inner, length], strict=True))


@pytest.mark.parametrize("chunk", [2, 7, files.CHUNK])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_run_of_any_part_from_any_parts(
    shape: tuple[int, ...], interleaved: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    source = random.Random(repr(shape))
    dim = shape.index(12)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for written, read in ((a, b) for a in (1, 2, 3, 6) for b in (1, 2, 3, 6)):
        stored = [
            (region, run) for region in parts(dim, written, interleaved) for run in cuts(
                elements(shape, region), 3, source
            )
        ]  # fmt: skip
        entry = TensorEntry(shape, "int64", [Piece(0, *run, region) for region, run in stored])
        assert _covers(entry)
        entry.pieces.pop(source.randrange(len(entry.pieces)))
        assert not _covers(entry), "a piece is missing"
        for region in parts(dim, read, interleaved):
            expected = take(whole, region)
            assert len(expected) == elements(shape, region)
            for start, stop in cuts(len(expected), 3, source):
                target = torch.full((stop - start,), -1)
                wanted = blocks(shape, dim, region, start, stop)
                for other, (first, last) in stored:
                    piece = take(whole, other)[first:last]
                    for block in blocks(shape, dim, other, first, last):
                        for found in filter(None, (overlap(block, each) for each in wanted)):
                            _copy(piece, target, found, lambda: None)
                assert torch.equal(target, expected[start:stop])
