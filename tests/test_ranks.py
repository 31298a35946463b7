"""The harness itself: a failure on any rank must be seen, with its traceback."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

IMPORTED = {"deepspeed", "torch._dynamo", "megatron_lite.training.run"}


def missing_imports() -> set[str]:
    return IMPORTED - sys.modules.keys()


def sum_of_ranks() -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return os.getpid(), total.item()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the reason")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def test_ranks_are_processes_that_talk_to_each_other() -> None:
    results = run_ranks(sum_of_ranks, 3)
    assert [total for _, total in results] == [3.0, 3.0, 3.0]
    assert len({pid for pid, _ in results} | {os.getpid()}) == 4


def test_ranks_start_with_the_trainer_imported() -> None:
    assert run_ranks(missing_imports, 1) == [set()]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1.*fail_on_rank_one.*the reason"):
        run_ranks(fail_on_rank_one, 2)


def test_a_hanging_rank_is_reported_with_every_stack() -> None:
    with pytest.raises(AssertionError, match=r"(?s)no answer.*hang_on_rank_one"):
        run_ranks(hang_on_rank_one, 2, timeout=5)
