"""Layouts of every pair of features against one rank: a part of what ``make grid`` does."""

from __future__ import annotations

import pytest
from grid import Layout, Verdict, covering, layouts, pairs, verdicts
from layout_runs import KEYS

from megatron_lite.config import config_from_keys

STEPS = 6
"""Fewer than the whole grid's: eight ranks share two cores."""


def is_refused(layout: Layout) -> bool:
    """As docs/parallelism.md says: ZeRO 2 and 3 do not go with several micro-batches in flight."""
    return layout.pp > 1 and layout.zero > 1


VALID = [layout for layout in layouts() if not is_refused(layout)]
"""Not by what the configuration refuses: a rule too many would make the grid smaller in silence."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Verdict]:
    return dict(verdicts(covering(VALID), tmp_path_factory.mktemp("grid"), STEPS))


@pytest.mark.slow
def test_every_pair_of_features_trains_as_one_rank(found: dict[Layout, Verdict]) -> None:
    assert {layout.name: verdict for layout, verdict in found.items() if not verdict.holds} == {}


def test_every_pair_occurs_and_few_layouts_suffice() -> None:
    of_all = set().union(*map(pairs, VALID))
    for candidates in (VALID, VALID[::-1]):  # equals may come in any order
        chosen = covering(candidates)
        assert set().union(*map(pairs, chosen)) == of_all
        assert len(chosen) < len(VALID) / 10


def test_the_grid_is_as_large_as_the_documentation_says() -> None:
    assert (len(layouts()), len(VALID)) == (524, 408)


def test_only_zero_2_and_3_in_stages_are_refused_and_it_says_why() -> None:
    for layout in layouts():
        sentence = layout.refusal()
        if is_refused(layout):
            expected = (
                f"zero_optimization.stage {layout.zero} does not go with pipe_parallel_size {layout.pp}"
            )
            assert sentence is not None, layout.name
            assert sentence.startswith(expected), layout.name
        else:
            assert sentence is None, layout.name


def test_every_layout_takes_the_ranks_it_says() -> None:
    for layout in VALID:
        config = config_from_keys({**KEYS, **layout.keys}, world_size=layout.ranks)
        assert config.parallel.data_parallel_size == layout.dp
