"""On the same layout a resumed run is the unbroken run, bit by bit: losses, files, random generators."""

from __future__ import annotations

from pathlib import Path

import pytest
from operators import COMPILES_AN_OPERATOR
from ranks import run_ranks
from small_run import Run, make_engine, save, start, train

from megatron_lite.checkpoint import load_checkpoint

LAYOUTS = [
    *(Run(stage, precision, dropout=0.1) for stage in range(4) for precision in ("fp32", "bf16", "fp16")),
    *(Run(stage, "bf16", grad_accum_dtype="fp32") for stage in (1, 2, 3)),
    Run(2, "bf16", offload=True),
    Run(3, "bf16", offload=True, offload_parameters=True),
    Run(2, zero=(("round_robin_gradients", True),)),
    Run(3, zero=(("sub_group_size", 200),)),
    Run(3, "bf16", partitioned_from_start=True),
    *(Run(stage, "bf16", frozen=True) for stage in (0, 1, 3)),
]

OPTIMIZERS = [
    *(Run(stage, "bf16", optimizer) for stage, optimizer in ((0, "sgd"), (1, "lion"), (3, "sgd"))),
    *(Run(stage, precision, "adafactor") for stage, precision in ((0, "fp32"), (0, "bf16"), (2, "bf16"))),
    Run(0, "fp32", "muon"),
    Run(1, "fp32", "muon"),
    Run(1, "bf16", "muon", grad_accum_dtype="fp32"),
    Run(2, "bf16", "muon"),
    Run(2, "fp32", "muon", offload=True),
    Run(3, "bf16", "muon", zero=(("reduce_scatter", False),)),
]


def unbroken_and_first_part(folder: Path, runs: list[Run], half: int, steps: int) -> dict[str, list[float]]:
    """Each run to its end, and again up to ``half``, where it is saved."""
    losses = {}
    for run in runs:
        context = start()
        engine = make_engine(run)
        losses[str(run)] = train(engine, 0, steps)
        save(run, engine, context, folder / "unbroken", steps)
        engine.destroy()
        start()
        engine = make_engine(run)
        train(engine, 0, half)
        save(run, engine, context, folder / "resumed", half)
        engine.destroy()
    return losses


def second_part(folder: Path, runs: list[Run], half: int, steps: int) -> dict[str, list[float]]:
    """Each run from ``half`` on."""
    context = start()
    losses = {}
    for run in runs:
        engine = make_engine(run)
        assert load_checkpoint(folder / "resumed" / str(run), engine, context) == {"step": half}
        losses[str(run)] = train(engine, half, steps)
        save(run, engine, context, folder / "resumed", steps)
        engine.destroy()
    return losses


def check_bitwise(folder: Path, runs: list[Run], half: int, steps: int) -> None:
    """Fresh processes go on exactly: every loss, and every byte of every file of the last checkpoint.

    The files carry the weights, the optimizer's state, loss scale, counters and the random generators.
    """
    unbroken = run_ranks(unbroken_and_first_part, 2, folder, runs, half, steps)[0]
    resumed = run_ranks(second_part, 2, folder, runs, half, steps)[0]
    for run in map(str, runs):
        assert unbroken[run][-1] < unbroken[run][0], f"{run} does not train"
        assert resumed[run] == unbroken[run][half:], run
        expected, actual = (folder / kind / run / f"global_step{steps}" for kind in ("unbroken", "resumed"))
        for file in sorted(expected.iterdir()):
            assert file.read_bytes() == (actual / file.name).read_bytes(), f"{run}: {file.name}"


@pytest.mark.slow
def test_every_layout(tmp_path: Path) -> None:
    check_bitwise(tmp_path, LAYOUTS, half=4, steps=8)


@pytest.mark.slow
def test_every_optimizer(tmp_path: Path) -> None:
    check_bitwise(tmp_path, OPTIMIZERS, half=3, steps=6)


@pytest.mark.slow
@COMPILES_AN_OPERATOR
def test_deepspeed_cpu_adam(tmp_path: Path) -> None:
    """Its C++ object counts steps too: from step 20 on, its running power of beta has its own last bits."""
    check_bitwise(tmp_path, [Run(3, "fp32", "cpuadam", offload=True)], half=20, steps=26)
