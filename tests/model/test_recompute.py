"""Activation checkpointing changes what is kept, never what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import by_name, random_tokens, small_gpt

from megatron_lite.model import GPT, token_loss

SHAPE = {"num_layers": 3, "pos_emb": "rotary", "num_kv_heads": 2}
DROPOUTS = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def gradients(gpt: GPT) -> dict[str, torch.Tensor]:
    """Gradients of one training step, dropout drawn from a fixed seed; the generator's next draw too."""
    torch.manual_seed(5)
    tokens = random_tokens(2, 17)
    token_loss(gpt.train()(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
    found = {name: p.grad for name, p in by_name(gpt).items() if p.grad is not None}
    return found | {"next draw": torch.rand(3)}


@pytest.mark.parametrize("dropouts", [{}, DROPOUTS])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_same_gradients(every: int, dropouts: dict[str, float]) -> None:
    kept = gradients(small_gpt(**SHAPE, **dropouts))
    recomputed = gradients(
        small_gpt(**SHAPE, **dropouts, checkpoint_activations=True, checkpoint_num_layers=every)
    )
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name


def kept_numbers(**keys: Any) -> int:
    """How many numbers autograd keeps between forward and backward."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    gpt = small_gpt(num_layers=4, **keys).train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt(random_tokens(2, 16))
    return sum(sizes)


def test_it_keeps_less() -> None:
    everything = kept_numbers()
    by_pairs = kept_numbers(checkpoint_activations=True, checkpoint_num_layers=2)
    by_blocks = kept_numbers(checkpoint_activations=True, checkpoint_num_layers=1)
    assert by_pairs < everything / 4
    assert by_blocks < everything / 4


def test_nothing_is_recomputed_without_training() -> None:
    gpt = small_gpt(**SHAPE, checkpoint_activations=True)
    calls: list[int] = []
    gpt.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gpt.eval()(random_tokens(1, 8)).sum().backward()
    assert len(calls) == 1
    gpt.train()(random_tokens(1, 8)).sum().backward()
    assert len(calls) == 3
