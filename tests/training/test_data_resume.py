"""A resumed run goes on with the next unseen sample of the data that it began with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from training_runs import KEYS, records, train_rank, write_corpus

from megatron_lite.data.fingerprint import fingerprint
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.mixture import Phase
from megatron_lite.training import data_state
from megatron_lite.training import run as run_module
from megatron_lite.training.batch_ramp import plan_batches
from megatron_lite.training.data_state import first_change, plan_phases


def recorded(all_keys: list[dict[str, Any]], world_size: int) -> list[list[int]]:
    """Runs one after another; for each, the samples that this rank fetched."""
    original = run_module.micro_batch
    runs = []
    for keys in all_keys:
        fetched: list[int] = []

        def record(dataset: Any, first: int, count: int, seen: list[int] = fetched, **rest: Any) -> Any:
            seen.extend(range(first, first + count))
            return original(dataset, first, count, **rest)

        run_module.micro_batch = record
        try:
            train_rank(keys, world_size)
        finally:
            run_module.micro_batch = original
        runs.append(fetched)
    return runs


def test_other_batch_sizes_and_ranks_go_on_with_the_next_sample(tmp_path: Path) -> None:
    corpora = [str(write_corpus(tmp_path / name)) for name in ("a", "b") if not (tmp_path / name).mkdir()]
    folder = str(tmp_path / "run")
    common = {
        **KEYS,
        "train_data_paths": corpora,
        "run_dir": folder,
        "eval_iters": 0,
        "lr_decay_style": "constant",
        "train_data_weights_schedule": [[3, [0.2, 0.8]], [9, [0.9, 0.1]]],
    }
    load = {"load": f"{folder}/checkpoints"}
    one = [
        {**common, "train_iters": 4, "train_batch_size": 8},
        {**common, **load, "train_iters": 6, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 1},
    ]
    two = [
        {**common, **load, "train_iters": 10, "train_batch_size": 12},
        {**common, **load, "train_iters": 11, "train_batch_size": 8, "train_data_weights_schedule": None},
    ]
    ((first, second),) = run_ranks(recorded, 1, one, 1)
    third, fourth = zip(*run_ranks(recorded, 2, two, 2), strict=True)
    assert first == list(range(32))
    assert second == list(range(32, 40))
    assert sorted(third[0] + third[1]) == list(range(40, 88))
    assert sorted(fourth[0] + fourth[1]) == list(range(88, 96))
    index = json.loads((Path(folder) / "checkpoints/global_step11/index.json").read_text())
    # The phases of the past stay as they were; the first batch size put step 3 at sample 24.
    state = index.get("trainer_state") or index["content"]["trainer_state"]
    assert state["data"]["phases"] == [
        [0, [0.5, 0.5]], [24, [0.2, 0.8]], [76, [0.9, 0.1]], [88, [0.5, 0.5]]
    ]  # fmt: skip
    last = next(r for r in reversed(records(Path(folder))) if "data/epochs/corpus" in r)
    per_epoch = 99_238 * 8 // 8 // 32  # about: windows of each corpus
    drawn = [last["data/epochs/corpus"], last["data/epochs/corpus#2"]]
    expected = [12 + 52 * 0.2 + 12 * 0.9 + 4, 12 + 52 * 0.8 + 12 * 0.1 + 4]
    assert np.array(drawn) * per_epoch == pytest.approx(expected, abs=4)


def test_changed_files_are_refused_by_name_unless_accepted(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    keys = {**KEYS, "data_path": str(corpus), "run_dir": str(tmp_path / "run"), "eval_iters": 0}
    run_ranks(train_rank, 2, {**keys, "train_iters": 2}, 2)
    keys |= {"load": str(tmp_path / "run/checkpoints"), "train_iters": 3}
    moved = tmp_path / "elsewhere"
    for ending in (".bin", ".idx"):
        os.rename(f"{corpus}{ending}", f"{moved}{ending}")
    run_ranks(train_rank, 2, {**keys, "data_path": str(moved)}, 2)  # the same data at another place
    content = bytearray(Path(f"{moved}.bin").read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    Path(f"{moved}.bin").write_bytes(content)
    keys |= {"data_path": str(moved), "train_iters": 4}
    with pytest.raises(
        AssertionError, match=r"train data \S*elsewhere has changed since the checkpoint: the"
    ):
        run_ranks(train_rank, 2, keys, 2)
    assert run_ranks(train_rank, 2, {**keys, "accept_changed_data": True}, 2) == [0, 0]


def warnings_of(all_keys: list[dict[str, Any]]) -> list[list[str]]:
    """Runs one after another; the warnings of each."""
    said: list[str] = []
    data_state.LOGGER.warning = lambda text, *values: said.append(text % values)  # type: ignore[method-assign]
    warnings = []
    for keys in all_keys:
        said.clear()
        train_rank(keys, 1)
        warnings.append([sentence for sentence in said if "samples" in sentence])
    return warnings


def test_another_order_of_the_data_is_told(tmp_path: Path) -> None:
    """The files are the same, and sample i is another: by the seed, or the length."""
    corpus = write_corpus(tmp_path)
    keys = {**KEYS, "data_path": str(corpus), "run_dir": str(tmp_path / "run"), "eval_iters": 0}
    load = {"load": str(tmp_path / "run/checkpoints")}
    first, same, other = run_ranks(
        warnings_of,
        1,
        [
            {**keys, "train_iters": 1},
            {**keys, **load, "train_iters": 2, "split": "969/30/1"},
            {**keys, **load, "train_iters": 3, "seed": 7, "seq_length": 16},
        ],
    )[0]
    assert first == same == []
    (sentence,) = other
    assert sentence.endswith("come twice or not at all: seed is 7 (was 1234), seq_length is 16 (was 32)")


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    def write(name: str, documents: list[list[int]], side: str | None = None) -> IndexedDataset:
        with IndexedWriter(tmp_path / name, np.dtype("<u2")) as writer:
            for document in documents:
                writer.add(document)
        if side is not None:
            (tmp_path / f"{name}.json").write_text(side)
        return IndexedDataset(tmp_path / name)

    documents = [[number] * 100 for number in range(1000)]
    before = fingerprint(write("a", documents))
    assert fingerprint(write("b", documents)).difference(before) is None
    other = [document if number != 0 else [7] * 100 for number, document in enumerate(documents)]
    assert fingerprint(write("c", other)).difference(before) == "the same size and other content"
    assert (
        fingerprint(write("d", documents[1:])).difference(before) == "99,900 tokens where there were 100,000"
    )
    cut = [[*documents[0], *documents[1]], *documents[2:]]
    assert fingerprint(write("e", cut)).difference(before) == "999 documents where there were 1,000"
    sums = [fingerprint(write("f", documents, json.dumps({"xxh3_128": {"bin": each}}))) for each in "xyx"]
    assert sums[1].difference(sums[0]) == "the same size and other content"
    assert sums[2].difference(sums[0]) is None
    assert before.difference(sums[0]) is None, "a side file that is not there says nothing"
    for foreign in ("{}", "[1]", "no JSON", '{"xxh3_128": 3}'):
        assert fingerprint(write("g", documents, foreign)).difference(before) is None
    saved = {"train": [before.to_dict()]}
    assert first_change(json.loads(json.dumps(saved)), {"train": [before]}) is None
    assert "2 train data sets where" in str(first_change(saved, {"train": [before, before]}))


@given(
    ramp=st.one_of(st.none(), st.tuples(st.just(4), st.just(4), st.integers(100, 3000))),
    done=st.integers(0, 60),
    more=st.integers(0, 60),
)
def test_samples_after_some_steps_are_counted(
    ramp: tuple[int, int, int] | None, done: int, more: int
) -> None:
    plan = plan_batches(16, 8, ramp, 4)
    samples = plan.samples(done)
    steps = list(plan.following(samples, more))
    assert [first for first, _ in steps] == [plan.samples(done + step) for step in range(more)]
    assert plan.samples_after(samples, more) == samples + sum(count for _, count in steps)
    odd = samples + 3  # another batch size before
    assert plan.samples_after(odd, more) == odd + sum(count for _, count in plan.following(odd, more))


def test_phases_of_a_resumed_run() -> None:
    plan = plan_batches(10, 8, None, 1)
    schedule = [(5, (0.5, 0.5)), (8, (0.0, 1.0))]
    fresh = plan_phases((1, 3), schedule, plan, 0, 0, [])
    assert fresh == (Phase(0, (0.25, 0.75)), Phase(50, (0.5, 0.5)), Phase(80, (0.0, 1.0)))
    assert plan_phases((1, 3), schedule, plan, 6, 60, fresh[:2]) == fresh
    # Steps 0 to 6 took 20 samples each: what is past stays, what is to come is counted from here.
    history = [Phase(0, (0.25, 0.75)), Phase(100, (0.5, 0.5))]
    assert plan_phases((1, 3), schedule, plan, 7, 140, history) == (*history, Phase(150, (0.0, 1.0)))
    changed = plan_phases((1, 1), [], plan, 6, 60, fresh[:1])
    assert changed == (fresh[0], Phase(60, (0.5, 0.5)))
