"""The numbers of the optimizer's state: those of a parameter where it counts them, of the group where not."""

from __future__ import annotations

from typing import Any

import torch

from megatron_lite.checkpoint.layouts.unpartitioned import parameters_themselves
from megatron_lite.checkpoint.optimizer_state import collect_scalars
from megatron_lite.parallel.parameter import ParameterFactory


class FusedAdam(torch.optim.Optimizer):
    """DeepSpeed's, as far as its counting goes: ``state`` is the last parameter's after the loop."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
            if trained:
                state["step"] += 1


def numbers(optimizer: type[torch.optim.Optimizer]) -> dict[str, dict[str, float]]:
    """By parameter, what is saved of two groups after 5 steps; "b" has no gradient in the first 2."""
    factory = ParameterFactory(seed=1)
    a, b, c, d = (factory.make(name, (3,), lambda value, _: value.zero_()) for name in "abcd")
    made = optimizer([{"params": [a, b, c]}, {"params": [d]}])
    for step in range(5):
        for p in (a, b, c, d):
            p.grad = None if (p is b and step < 2) or (p is d and step > 2) else torch.ones(3)
        made.step()
    return collect_scalars(parameters_themselves(made))


def test_fused_adam_counts_the_steps_of_a_group() -> None:
    """Another Adam goes on from there at a step for each parameter, or for each partition."""
    assert numbers(FusedAdam) == {name: {"step": n} for name, n in zip("abcd", (5, 5, 5, 3), strict=True)}


def test_others_count_the_steps_of_a_parameter() -> None:
    assert numbers(torch.optim.AdamW) == {
        name: {"step": n} for name, n in zip("abcd", (5, 3, 5, 3), strict=True)
    }
