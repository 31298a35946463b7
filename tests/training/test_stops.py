"""What ends a run before its time, and what is shown on the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training_runs import KEYS, losses, records, run, write_corpus

from megatron_lite.config import config_from_keys
from megatron_lite.config.sections.checkpoint import CheckpointSection
from megatron_lite.training.hooks.checkpoints import is_due


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(("precision", "log_interval"), [("fp32", 100), ("bf16", 1)])
def test_a_loss_that_is_no_number_stops_the_run(
    precision: str, log_interval: int, corpus: Path, tmp_path: Path
) -> None:
    """At the next line, or before the state is saved."""
    keys = {"log_interval": log_interval, "checkpoint_factor": 3, "gradient_clipping": 0.0, "warmup": 0.0}
    wild = {"type": "SGD", "params": {"lr": 1e30}}
    with pytest.raises(AssertionError, match=rf"TrainingError: the loss is \w+ in steps .* \({precision}\)"):
        run(tmp_path, corpus, optimizer=wild, precision=precision, **keys)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_fp16_scales_down_before_it_gives_up(corpus: Path, tmp_path: Path) -> None:
    """A scale of 2^40 overflows; it is halved at every overflow until steps are taken, and the loss falls."""
    fp16 = {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}
    figures = [r for r in run(tmp_path, corpus, fp16=fp16, train_iters=60) if "train/lr" in r]
    skipped = [record["train/skipped_steps"] == 1 for record in figures]
    scales = [record["train/loss_scale"] for record in figures]
    assert skipped[0]
    assert not skipped[-1]
    for before, after, skip in zip(scales, scales[1:], skipped, strict=False):
        assert after == (before / 2 if skip else before)
    taken = losses(records(tmp_path))
    assert len(taken) == skipped.count(False)
    assert taken[-1] < taken[0] - 0.5


def test_fp16_gives_up_at_the_smallest_scale(corpus: Path, tmp_path: Path) -> None:
    wild = {"type": "SGD", "params": {"lr": 1e30}}
    with pytest.raises(AssertionError, match=r"TrainingError: the loss is \w+ in steps .* \(fp16\)"):
        run(
            tmp_path,
            corpus,
            optimizer=wild,
            fp16={"enabled": True, "hysteresis": 1},
            train_iters=60,
            warmup=0.0,
        )


def test_figures_add_up(corpus: Path, tmp_path: Path) -> None:
    """Two ranks, a line every 4 steps: the means of the losses of a run that logs every step."""
    every = run(tmp_path / "every", corpus, world_size=2, train_iters=10)
    some = run(tmp_path / "some", corpus, world_size=2, train_iters=10, log_interval=4)
    singles = losses(every)
    assert [r["step"] for r in some if "train/loss" in r] == [4, 8, 10]
    expected = [sum(singles[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert losses(some) == pytest.approx(expected, rel=1e-6)
    last = [record for record in some if "train/loss" in record][-1]
    assert last["train/tokens"] == 10 * 8 * 32
    assert last["speed/tokens_per_second"] == pytest.approx(32 * last["speed/samples_per_second"])
    assert last["speed/seconds_per_step"] == pytest.approx(8 / last["speed/samples_per_second"])
    valid = every[-1]
    assert valid["valid/perplexity"] == pytest.approx(math.exp(valid["valid/loss"]))
    # Bytes as tokens, but for the end-of-document tokens, which have none.
    assert valid["valid/bits_per_byte"] == pytest.approx(valid["valid/loss"] / math.log(2), rel=0.05)


def test_the_ramp_takes_whole_batches_on_any_number_of_ranks(corpus: Path, tmp_path: Path) -> None:
    ramp = {"rampup_batch_size": [4, 4, 512], "train_iters": 8, "train_batch_size": 12}
    one = run(tmp_path / "one", corpus, world_size=1, **ramp)
    two = run(tmp_path / "two", corpus, world_size=2, **ramp)
    tokens = [record["train/tokens"] / 32 for record in one if "train/tokens" in record]
    assert tokens == [4, 8, 16, 28, 40, 52, 64, 76]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_checkpoints_are_due_linearly_or_in_powers() -> None:
    linear = CheckpointSection(run_dir="x", save="x", checkpoint_factor=30, extra_save_iters=[7])
    assert [step for step in range(100) if is_due(step, linear)] == [7, 30, 60, 90]
    powers = CheckpointSection(run_dir="x", save="x", checkpoint_factor=3, checkpoint_scale="log")
    assert [step for step in range(100) if is_due(step, powers)] == [1, 3, 9, 27, 81]
    never = CheckpointSection(run_dir="x", save="x")
    assert not any(is_due(step, never) for step in range(1, 100))


def test_dropout_differs_between_ranks_and_steps_and_comes_back() -> None:
    from megatron_lite.parallel.context import Axis, ParallelContext
    from megatron_lite.training.loop import seed_dropout

    config = config_from_keys({**KEYS, "data_path": "unused"}, world_size=4)

    def draw(data_rank: int, step: int) -> float:
        place = ParallelContext(0, 4, 0, torch.device("cpu"), data=Axis(4, data_rank))
        seed_dropout(config, place, step)
        return float(torch.rand(()))

    assert len({draw(rank, step) for rank in range(3) for step in range(3)}) == 9
    assert draw(1, 2) == draw(1, 2)
