"""The model cut into pipeline stages, as DeepSpeed's ``PipelineModule``."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced
from torch import nn

from megatron_lite.config import Config
from megatron_lite.model.block import Block
from megatron_lite.model.ends import Embedding, FinalNorm, Head
from megatron_lite.model.gpt import LayerPlan, layer_plans
from megatron_lite.model.places import Places
from megatron_lite.model.recompute import run_layers, run_recomputing
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.parameter import ParameterFactory, spec_of
from megatron_lite.utils.errors import ConfigError

META = torch.device("meta")

NEOX_NAMES: dict[type[nn.Module], str] = {
    Embedding: "EmbeddingPipe",
    Block: "ParallelTransformerLayerPipe",
    FinalNorm: "NormPipe",
    Head: "ParallelLinearPipe",
}
"""What GPT-NeoX calls each layer: its users' ``type:`` expressions are written for these names."""

TIED = "embedding"
"""DeepSpeed's key of the matrix that the first and the last stage share."""


class PipelinedGPT(PipelineModule):
    """The layers of one stage of a :class:`megatron_lite.model.GPT`; no other layer is built.

    A tied matrix is drawn by the first and by the last stage under the same global name, so that the two are
    equal; DeepSpeed sums their gradients, and the norm and the checkpoint count the first one only.

    Attributes:
        coming: where the tokens of the micro-batches that have not been here yet stand. Every stage has the
            data and works through it in order, so that stages need not send this to each other.
    """

    def __init__(self, config: Config, context: ParallelContext, factory: ParameterFactory) -> None:
        model, stages = config.model, context.pipe.size
        counted = layer_plans(model, replace(factory, device=META))
        self._bounds = stage_bounds(config.parallel.pipe_partition_method, counted, stages)
        self._recomputes = model.checkpoint_num_layers if model.checkpoint_activations else 0
        if context.expert.size > 1:
            check_experts(model.mlp_kinds, self._bounds)
        check_groups(counted, self._bounds, context.expert.size > 1)
        specs = [_spec(plan, not model.no_weight_tying) for plan in layer_plans(model, factory)]
        topology = PipeModelDataParallelTopology(stages, context.tensor.size, context.replicas.size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            super().__init__(specs, topology=topology)
        self.coming: list[Places | None] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stage's input (tokens for the first one) → its output (logits of the last one)."""
        places = self.coming.pop(0)
        if self._recomputes and self.training and torch.is_grad_enabled():
            return run_recomputing(self.forward_funcs, x, places, self._recomputes)
        return run_layers(self.forward_funcs, x, None, places)

    def _partition_layers(self, method: str = "") -> None:
        """Called by the constructor. DeepSpeed's own would build the whole model to count parameters."""
        self.parts = self._bounds
        stage = self._grid.get_stage_id()
        self._set_bounds(self.parts[stage], self.parts[stage + 1])


def stage_bounds(method: str, layers: Sequence[LayerPlan], stages: int) -> list[int]:
    """Where each stage begins in the list of ``layers``, and the list's length.

    Every stage has at least one block: see :func:`check_groups` (a head alone has no vectors).

    Args:
        method: ``type:EXPRESSION`` gives every stage as many layers whose class name, here or in GPT-NeoX,
            the regular expression finds; ``parameters`` balances parameters; ``uniform`` counts layers.
        layers: a GPT's; made on the meta device where ``parameters`` builds them.
        stages: at most the number of blocks.

    Raises:
        ConfigError: no layer has a name that the expression finds.
    """
    weights = [1] * len(layers)
    if method == "parameters":
        weights = [sum(p.numel() for p in plan.build().parameters()) for plan in layers]
    elif method.startswith("type:"):
        expression = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        names = [f"{plan.kind.__name__} {NEOX_NAMES[plan.kind]}" for plan in layers]
        weights = [int(bool(expression.search(name))) for name in names]
        if not any(weights):
            raise ConfigError(f"pipe_partition_method: no layer is called {method!r}; use type:transformer")
    # The embedding goes with the first block; the final norm and the head go with the last one.
    embedding, *blocks, norm, head = weights
    blocks[0] += embedding
    blocks[-1] += norm + head
    inner = partition_balanced(blocks, stages)[1:-1]
    return [0, *(int(bound) + 1 for bound in inner), len(layers)]


def check_experts(kinds: Sequence[str], bounds: Sequence[int]) -> None:
    """Raise unless every stage has experts: DeepSpeed's norm is a collective for each group of parameters."""
    for stage, (first, last) in enumerate(pairwise(bounds)):
        if "experts" not in kinds[max(first - 1, 0) : last - 1]:  # the embedding comes before the blocks
            raise ConfigError(
                f"pipeline stage {stage} would have no layer with experts, which expert_parallel_size asks "
                "for: choose a smaller expert_interval or fewer stages"
            )


def check_groups(layers: Sequence[LayerPlan], bounds: Sequence[int], divides_experts: bool = False) -> None:
    """Raise unless all stages have groups of the same kinds: parameters that decay, and those that do not.

    DeepSpeed's norm of the gradient is a collective for each group: other stages would wait for ever.
    ``layers`` are on the meta device. Experts that are divided over ranks have groups of their own, in every
    stage the same ones (:func:`check_experts`).
    """
    stages = [layers[first:last] for first, last in pairwise(bounds)]
    specs = [[spec_of(p) for layer in stage for p in layer.build().parameters()] for stage in stages]
    kinds = [{each.decays for each in found if not (divides_experts and each.is_expert)} for found in specs]
    for stage, kind in enumerate(kinds):
        if kind != kinds[0]:
            without, other = sorted((0, stage), key=lambda each: len(kinds[each]))
            raise ConfigError(
                f"pipeline stage {without} would have no parameters without weight decay (biases, weights of "
                f"norms; divided experts' do not count), stage {other} has some: give the layers some too "
                "(norm: rmsnorm, or use_bias_in_attn_linear: true), or take them from the head "
                "(use_bias_in_head: false)"
            )


def _spec(plan: LayerPlan, tied: bool) -> LayerSpec:
    if tied and plan.kind in (Embedding, Head):
        return TiedLayerSpec(TIED, plan.kind, *plan.arguments, tied_weight_attr="weight")
    return LayerSpec(plan.kind, *plan.arguments)
