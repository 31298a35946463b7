"""Layouts of every pair of features against one rank: a part of what ``make grid`` does."""

from __future__ import annotations

import pytest
from grid import Layout, Verdict, covering, layouts, pairs, verdicts
from layout_runs import KEYS

from megatron_lite.config import config_from_keys

STEPS = 6
"""Fewer than the whole grid's: eight ranks share two cores."""


def valid() -> list[Layout]:
    return [layout for layout in layouts() if layout.refusal() is None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Verdict]:
    return dict(verdicts(covering(valid()), tmp_path_factory.mktemp("grid"), STEPS))


@pytest.mark.slow
def test_every_pair_of_features_trains_as_one_rank(found: dict[Layout, Verdict]) -> None:
    assert {layout.name: verdict for layout, verdict in found.items() if not verdict.holds} == {}


def test_every_pair_occurs_and_few_layouts_suffice() -> None:
    candidates = valid()
    chosen = covering(candidates)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, candidates))
    assert len(chosen) < len(candidates) / 3
    assert covering(candidates[::-1]) != [], "the order of equals is all that may differ"


def test_what_is_refused_says_why() -> None:
    sentences = {layout: layout.refusal() for layout in layouts()}
    assert all(sentence is None or len(sentence.split()) > 5 for sentence in sentences.values())
    for layout, sentence in sentences.items():
        if layout.pp > 1 and layout.zero > 1 and layout.cp == "1" and layout.ep == 0:
            assert sentence is not None
            assert "does not go with pipe_parallel_size" in sentence


def test_every_layout_takes_the_ranks_it_says() -> None:
    for layout in valid():
        config = config_from_keys({**KEYS, **layout.keys}, world_size=layout.ranks)
        assert config.parallel.data_parallel_size == layout.dp
