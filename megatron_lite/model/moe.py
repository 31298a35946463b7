"""A mixture of experts in the place of a block's MLP. No token is dropped, however uneven the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_lite.model.experts import Experts
from megatron_lite.model.routing import Router
from megatron_lite.parallel.collectives import exchanged, start_exchange
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection


class MixtureOfExperts(nn.Module):
    """Each token through ``moe_top_k`` of ``moe_num_experts`` MLPs, their outputs weighted and added.

    A token becomes k rows, sorted by expert; the rows go to the ranks of the expert axis that have their
    experts, and come back::

        tokens ─ router ─ sort ─ exchange ─ sort ─ experts ─ unsort ─ exchange ─ unsort ─ weighted sum

    Shazeer et al., arXiv 1701.06538; Lepikhin et al., arXiv 2006.16668; without capacity as in MegaBlocks
    (Gale et al., arXiv 2211.15841). Every tensor rank routes all tokens of its replica, alike, and has a part
    of each of its experts.

    Attributes:
        num_experts: all of the layer's.
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.num_experts = config.moe_num_experts
        self.tensor, self.axis = factory.tensor, factory.expert
        self.router = Router(config, factory.child("router"))
        self.experts = Experts(config, factory.child("experts"))

    # Sizes depend on what the router chooses: nothing for a compiler.
    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream ``x [b, s, hidden]`` → the same shape."""
        x = self.tensor.enter(x)
        weights, chosen = self.router(x)
        chosen = chosen.flatten(0, 1)
        tokens, k = chosen.shape
        order, place = _sorting(chosen.flatten())
        rows = _Take.apply(x.flatten(0, 1), order // k, place.view(tokens, k))
        counts = _counts(chosen.flatten(), self.num_experts)
        out = self.experts(rows, counts) if self.axis.size == 1 else self._elsewhere(rows, counts)
        out = _Take.apply(out, place, order[:, None]).unflatten(0, (tokens, k))
        mixed = (out * weights.flatten(0, 1).to(out.dtype)[..., None]).sum(1)
        return self.tensor.leave(mixed.view_as(x))

    def _elsewhere(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``rows`` [n, hidden], ``counts`` [experts] of them for each → what the ranks that have them make.

        The counts are read on the host, once a layer: an exchange wants to know its sizes.
        """
        own = counts.view(self.axis.size, -1)
        each = [1] * self.axis.size
        theirs = start_exchange(own, each, each, self.axis)()  # [sender, expert here]
        sent, received = torch.stack([own.sum(1), theirs.sum(1)]).tolist()
        rows = exchanged(rows, sent, received, self.axis)
        expert = torch.arange(theirs.numel(), device=rows.device) % theirs.shape[1]
        order, place = _sorting(expert.repeat_interleave(theirs.flatten(), output_size=len(rows)))
        rows = _Take.apply(rows, order, place[:, None])
        out = self.experts(rows, theirs.sum(0))
        out = _Take.apply(out, place, order[:, None])
        return exchanged(out, received, sent, self.axis)


def _counts(keys: torch.Tensor, most: int) -> torch.Tensor:
    """How many of ``keys`` are 0, 1, ... most - 1. ``bincount`` would wait for their maximum on the host."""
    return keys.new_zeros(most).scatter_add_(0, keys, torch.ones_like(keys))


def _sorting(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(which row comes at each place when rows are sorted by ``keys``, the place of each row)."""
    order = keys.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place


class _Take(torch.autograd.Function):
    """Rows ``x[index]``, where ``places`` [rows of x, c] says which rows of the result are each row of x.

    The gradient is taken the same way. Autograd's own adds it up row by row: slow on a CPU, and on CUDA in an
    order that changes.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x[index]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient[places[:, 0]] if places.shape[1] == 1 else gradient[places].sum(1), None, None


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of ``model``, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]
