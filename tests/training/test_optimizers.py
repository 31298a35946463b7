"""Optimizers against their formulas; weight decay on matrices only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_lite.config.sections.optimizer import OptimizerBlock, OptimizerSection
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.training.deepspeed_defects import import_muon
from megatron_lite.training.lion import Lion
from megatron_lite.training.optimizers import build_optimizer, is_hidden_matrix, parameter_groups, set_lr
from megatron_lite.utils.errors import ConfigError

import_muon(compiled=False)


class Model(nn.Module):
    """A matrix and a vector inside a layer, and an embedding."""

    def __init__(self) -> None:
        super().__init__()

        def normal(value: torch.Tensor, generator: torch.Generator) -> None:
            value.normal_(generator=generator)

        factory = ParameterFactory(seed=1)
        self.embedding = factory.make("embed_in.weight", (5, 4), normal)
        self.matrix = factory.child("layers.0").make("weight", (4, 3), normal)
        self.vector = factory.child("layers.0").make("bias", (3,), normal)


def section(name: str, **params: Any) -> OptimizerSection:
    block = OptimizerBlock.model_validate({"type": name, "params": params})
    return OptimizerSection(optimizer=block, weight_decay=0.1)


def with_gradients(model: Model, step: int) -> Model:
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_only_matrices_decay() -> None:
    model = Model()
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert groups[1]["params"][0] is model.vector


def test_betas_that_are_not_given_are_those_of_the_optimizers_authors() -> None:
    assert build_optimizer(section("Lion", lr=0.1), Model()).param_groups[0]["betas"] == (0.9, 0.99)
    assert build_optimizer(section("Adam", lr=0.1), Model()).param_groups[0]["betas"] == (0.9, 0.999)
    given = section("Lion", lr=0.1, betas=[0.8, 0.7])
    assert build_optimizer(given, Model()).param_groups[0]["betas"] == (0.8, 0.7)


def test_adam_is_decoupled_as_deepspeed_has_it() -> None:
    """Kingma & Ba's update with decay outside of it, in float64, by hand."""
    model, lr, (beta1, beta2), eps = Model(), 0.01, (0.9, 0.95), 1e-8
    optimizer = build_optimizer(section("Adam", lr=lr, betas=[beta1, beta2], eps=eps), model)
    expected = [parameter.detach().double().clone() for parameter in model.parameters()]
    first = [torch.zeros_like(value) for value in expected]
    second = [torch.zeros_like(value) for value in expected]
    for step in range(1, 6):
        with_gradients(model, step)
        for index, parameter in enumerate(model.parameters()):
            gradient = parameter.grad.double()
            first[index] = beta1 * first[index] + (1 - beta1) * gradient
            second[index] = beta2 * second[index] + (1 - beta2) * gradient**2
            corrected = second[index] / (1 - beta2**step)
            update = first[index] / (1 - beta1**step) / (corrected.sqrt() + eps)
            decay = 0.1 if parameter.dim() == 2 else 0.0
            expected[index] = expected[index] - lr * (update + decay * expected[index])
        optimizer.step()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-5, atol=1e-6)


def test_lion_is_algorithm_two_of_its_paper() -> None:
    parameter = nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0)))
    optimizer = Lion([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.3)
    value, momentum = parameter.detach().clone(), torch.zeros(7)
    for step in range(6):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        optimizer.step()
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        value = value - 0.01 * (update + 0.3 * value)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(parameter.detach(), value)


def test_muon_takes_the_hidden_matrices_and_orthogonalises_them() -> None:
    model = Model()
    optimizer = build_optimizer(section("Muon", lr=0.02, adam_lr=0.002), model)
    muon = [group for group in optimizer.param_groups if group["use_muon"]]
    assert [parameter is model.matrix for group in muon for parameter in group["params"]] == [True]
    assert is_hidden_matrix(model.matrix)
    assert not is_hidden_matrix(model.embedding)
    before = model.matrix.detach().clone()
    set_lr(optimizer, 0.01)
    adam_rates = [group["lr"] for group in optimizer.param_groups if not group["use_muon"]]
    assert adam_rates == pytest.approx([0.001, 0.001])
    with_gradients(model, 1)
    optimizer.step()
    update = (before * (1 - 0.01 * 0.1) - model.matrix.detach()) / 0.01
    # The momentum-averaged gradient of the first step is parallel to the gradient; its polar factor has
    # singular values 1, which five Newton-Schulz steps reach within a third; times sqrt(rows / columns).
    singular = torch.linalg.svdvals(update) / (4 / 3) ** 0.5
    assert singular.min() > 0.6
    assert singular.max() < 1.4


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "Lion", "AdamW", "Muon"])
def test_every_optimizer_lowers_a_quadratic(name: str) -> None:
    model = Model()
    optimizer = build_optimizer(section(name, lr=0.02), model)
    start = sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    for _ in range(40):
        loss = sum(parameter.square().sum() for parameter in model.parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(float(parameter.detach().square().sum()) for parameter in model.parameters()) < 0.8 * start


def test_an_argument_that_it_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.params.*nesterov"):
        build_optimizer(section("Lion", lr=0.1, nesterov=True), Model())
