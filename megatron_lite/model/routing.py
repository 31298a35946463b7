"""Which experts a token goes to, and what keeps the experts evenly used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.initialize import inner_init
from megatron_lite.parallel.collectives import start_sum
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection


class Router(nn.Module):
    """Scores every expert for every token and takes the ``moe_top_k`` best, all in fp32.

    The k probabilities are divided by their sum (Mixtral, arXiv 2401.04088). With k = 1 the probability
    itself is the weight (Switch Transformer, arXiv 2101.03961): divided, it would teach the router nothing.

    Training adds the gradient of the balance loss, without the loss: for one sequence of T tokens it is ::

        Σ_e f_e · P_e,   f_e = (experts / (k T)) · tokens that chose e,   P_e = mean probability of e

    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), which is 1 when all experts are used alike. What trains is
    its mean over the sequences of the global batch and the layers with experts, times ``moe_loss_coeff``.
    Each term belongs to one sequence, so that neither micro-batches nor ranks change the sum.

    Attributes:
        loss_weight: what the engine multiplies a sequence's loss by before the backward (its share of the
            global batch, and fp16's loss scale); set before each step.
        load: tokens that chose each expert in the backward passes since somebody set it to 0: [experts] fp32.
    """

    def __init__(self, config: ModelSection, factory: ParameterFactory) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.moe_num_experts, config.moe_top_k
        self.tensor, self.context = factory.tensor, factory.context
        self.coefficient = config.moe_loss_coeff / config.mlp_kinds.count("experts")
        self.loss_weight = 0.0
        shape = (config.moe_num_experts, config.hidden_size)
        partial = self.tensor.size > 1  # each rank sees a share of what its choice leads to
        self.weight = factory.make("weight", shape, inner_init(config), partial=partial)
        self.load: torch.Tensor | float = 0.0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x [b, s, hidden]`` → weights (fp32) and numbers of the chosen experts, both [b, s, k]."""
        probabilities = F.linear(x.float(), self.weight.float()).softmax(-1)
        chosen = probabilities.detach().topk(self.top_k).indices
        if self.training and torch.is_grad_enabled():
            probabilities = _Balance.apply(probabilities, self._choices(chosen), self)
        weights = probabilities.gather(-1, chosen)
        return (weights / weights.sum(-1, keepdim=True) if self.top_k > 1 else weights), chosen

    def _choices(self, chosen: torch.Tensor) -> torch.Tensor:
        """How many tokens of each sequence chose each expert: [b, experts] fp32."""
        choices = chosen.flatten(1)
        counts = choices.new_zeros(len(choices), self.num_experts, dtype=torch.float32)
        return counts.scatter_add_(1, choices, torch.ones_like(choices, dtype=torch.float32))


class _Balance(torch.autograd.Function):
    """The probabilities as they are; the backward adds the gradient of the balance loss.

    In the backward, since recomputed layers run forward twice.
    """

    @staticmethod
    def forward(ctx: Any, probabilities: torch.Tensor, choices: torch.Tensor, router: Router) -> torch.Tensor:
        ctx.save_for_backward(choices)
        ctx.router, ctx.length = router, probabilities.shape[1]
        return probabilities.view_as(probabilities)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (choices,), router = ctx.saved_tensors, ctx.router
        router.load = router.load + choices.sum(0)
        length = ctx.length * router.context.size
        whole = start_sum(choices.clone(), router.context)() if router.context.size > 1 else choices
        used = whole * (whole.shape[1] / (router.top_k * length))  # f_e of each sequence
        # The tensor ranks find the same gradient, and add theirs up.
        factor = router.loss_weight * router.coefficient / (length * router.tensor.size)
        return gradient + factor * used[:, None], None, None
