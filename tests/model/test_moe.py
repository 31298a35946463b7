"""Mixtures of experts: against Mixtral's block and a dense sum, the balance loss by its formula, no drops."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from small_models import VOCABULARY, random_tokens, scatter_weights, small_config, small_gpt
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from megatron_lite.model import experts, moe
from megatron_lite.model.experts import grouped, one_by_one
from megatron_lite.model.mlp import MLP
from megatron_lite.model.moe import MixtureOfExperts, routers_of
from megatron_lite.model.routing import Router
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.parameter import ParameterFactory, spec_of

EXPERTS: dict[str, Any] = {"moe_num_experts": 4, "moe_top_k": 2, "expert_interval": 1}


def mixture(**keys: Any) -> MixtureOfExperts:
    made = MixtureOfExperts(small_config(**{**EXPERTS, **keys}).model, ParameterFactory(1))
    scatter_weights(made)
    return made


def activations(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_it_is_mixtrals_block() -> None:
    ours = mixture(activation="swiglu", use_bias_in_mlp=False, mlp_multiple_of=8, moe_loss_coeff=0.0)
    shape = {"hidden_size": 64, "intermediate_size": 88, "num_local_experts": 4, "num_experts_per_tok": 2}
    theirs = MixtralSparseMoeBlock(MixtralConfig(**shape))
    pairs = [
        (ours.router.weight, theirs.gate.weight),
        (ours.experts.weight_in, theirs.experts.gate_up_proj),
        (ours.experts.weight_out, theirs.experts.down_proj),
    ]
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own)
    ins, outs = [activations(), activations()], []
    for block, x in zip((ours, theirs), ins, strict=True):
        outs.append(block(x))
        outs[-1].square().sum().backward()
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(ins[0].grad, ins[1].grad)
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_it_is_a_sum_of_mlps(top_k: int) -> None:
    """Every expert as a dense MLP on every token, weighted; the other experts by 0. With one, by p itself."""
    ours = mixture(moe_top_k=top_k, moe_loss_coeff=0.0)
    x = activations()
    probabilities = F.linear(x, ours.router.weight).softmax(-1)
    kept = probabilities * (probabilities >= probabilities.topk(top_k).values[..., -1:])
    weights = kept / kept.sum(-1, keepdim=True) if top_k > 1 else kept
    dense = MLP(small_config().model, ParameterFactory(1))
    expected = torch.zeros_like(x)
    experts = ours.experts
    for number in range(4):
        with torch.no_grad():
            dense.dense_h_to_4h.weight.copy_(experts.weight_in[number])
            dense.dense_h_to_4h.bias.copy_(experts.bias_in[number])
            dense.dense_4h_to_h.weight.copy_(experts.weight_out[number])
            dense.dense_4h_to_h.bias.copy_(experts.bias_out[number])
            part = dense(x)
        expected = expected + weights[..., number : number + 1] * part
    torch.testing.assert_close(ours(x), expected)
    (by_formula,) = torch.autograd.grad(expected.square().sum(), ours.router.weight)
    (found,) = torch.autograd.grad(ours(x).square().sum(), ours.router.weight)
    torch.testing.assert_close(found, by_formula, rtol=1e-4, atol=1e-4)


def test_no_token_is_dropped() -> None:
    """However many choose the same expert: with three of four unused, the layer is the fourth's MLP."""
    ours = mixture(moe_top_k=1)
    with torch.no_grad():
        ours.router.weight.zero_()[2] = 1.0
    x = activations().detach().abs()
    weights, chosen = ours.router(x)
    assert (chosen == 2).all()
    inner = F.gelu(F.linear(x, ours.experts.weight_in[2], ours.experts.bias_in[2]))
    expected = weights * F.linear(inner, ours.experts.weight_out[2], ours.experts.bias_out[2])
    out = ours(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert ours.experts.weight_in.grad[[0, 1, 3]].abs().max() == 0.0


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10]], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_both_products_are_the_same(counts: list[int], has_bias: bool) -> None:
    rows, weight, bias = torch.randn(10, 16), torch.randn(4, 24, 16), torch.randn(4, 24)
    gradient, found = torch.randn(10, 24), []
    for linear in (one_by_one, grouped):
        inputs = [tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
        out = linear(*inputs[:2], inputs[2] if has_bias else None, torch.tensor(counts))
        used = inputs if has_bias else inputs[:2]
        found.append([out, *torch.autograd.grad(out, used, gradient)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_host_waits_for_counts_only_where_experts_are_divided(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And there once: the meta device has no numbers, so that any other reading of them fails."""
    read = Mock(return_value=[[21, 21], [21, 21]])
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    monkeypatch.setattr(moe, "start_exchange", lambda counts, *sizes: lambda: counts)
    monkeypatch.setattr(moe, "exchanged", lambda rows, *sizes: rows)
    monkeypatch.setattr(experts, "choose_expert_linear", lambda *where: grouped)
    factory = ParameterFactory(1, torch.bfloat16, torch.device("meta"), expert=Axis(ranks, 0))
    ours = MixtureOfExperts(small_config(**EXPERTS).model, factory)
    x = torch.randn(3, 7, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    ours(x).sum().backward()
    assert x.grad.shape == x.shape
    assert read.call_count == ranks - 1


def balance(router: Router, x: torch.Tensor) -> torch.Tensor:
    """The loss of each sequence: Σ_e f_e · P_e."""
    probabilities = F.linear(x, router.weight).softmax(-1)
    chosen = F.one_hot(probabilities.topk(router.top_k).indices, router.num_experts).sum(2).float()
    return (chosen.mean(1) / router.top_k * router.num_experts * probabilities.mean(1)).sum(-1)


def test_the_balance_loss_acts_on_the_gradient_only() -> None:
    """Whatever the batch is cut into; the outputs are those without it, and evaluation knows nothing."""
    ours, without = mixture(moe_loss_coeff=0.3), mixture(moe_loss_coeff=0.0)
    x, router = activations(), ours.router
    assert torch.equal(ours(x), without(x))
    losses = balance(router, x)
    assert losses.max() > 1.05, "an even use makes it 1"
    # The model has two layers with experts: each gets half the coefficient.
    expected = torch.autograd.grad(0.15 * 8.0 * losses.sum(), [router.weight, x])
    for pieces in (1, 3):
        router.weight.grad = x.grad = None
        router.load, router.loss_weight = 0.0, 8.0
        for part in x.chunk(pieces):
            (ours(part) * 0.0).sum().backward()
        torch.testing.assert_close(router.weight.grad, expected[0])
        torch.testing.assert_close(x.grad, expected[1])
        assert router.load.sum() == 3 * 7 * 2
    ours.eval()(x).sum().backward()
    assert router.load.sum() == 3 * 7 * 2


def test_every_layer_s_share_of_the_balance_loss() -> None:
    """Of three layers the first and the third have experts; recomputing counts nothing twice."""
    keys = {**EXPERTS, "num_layers": 3, "expert_interval": 2, "moe_loss_coeff": 0.5}
    gradients = []
    for recomputes in (False, True):
        gpt = small_gpt(**keys, checkpoint_activations=recomputes)
        routers = routers_of(gpt)
        assert [router.coefficient for router in routers] == [0.25, 0.25]
        for router in routers:
            router.loss_weight = 2.0
        gpt(random_tokens(2, 32)).float().square().sum().backward()
        assert all(router.load.sum() == 2 * 32 * 2 for router in routers)
        gradients.append([router.weight.grad for router in routers])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_an_expert_is_the_same_wherever_it_is() -> None:
    """Each is drawn alone, by its number: ranks hold slices of one and the same model."""
    config = small_config(**EXPERTS).model
    whole = MixtureOfExperts(config, ParameterFactory(1)).experts.weight_in
    assert len({float(expert.norm()) for expert in whole.detach()}) == 4
    for rank in (0, 1):
        factory = ParameterFactory(1, expert=Axis(2, rank))
        part = MixtureOfExperts(config, factory).experts.weight_in
        assert torch.equal(part, whole[2 * rank : 2 * rank + 2])
        assert spec_of(part).local_shape == tuple(part.shape)
        assert [member.name for member in spec_of(part).members] == [
            f"experts.{number}.dense_h_to_4h.weight" for number in (2 * rank, 2 * rank + 1)
        ]


def test_generation_with_a_cache() -> None:
    gpt = small_gpt(**EXPERTS, pos_emb="rotary").eval()
    scatter_weights(gpt)
    tokens = random_tokens(2, 12)
    cache = gpt.new_cache(2, 12)
    with torch.no_grad():
        pieces = [gpt(part, cache) for part in tokens.split([7, 1, 4], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), gpt(tokens), rtol=1e-4, atol=1e-4)
    assert pieces[0].shape[-1] == VOCABULARY
