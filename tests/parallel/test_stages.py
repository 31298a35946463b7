"""What the stages of a pipeline must have in common."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.config import config_from_keys
from megatron_lite.model.gpt import LayerPlan, layer_plans
from megatron_lite.parallel.parameter import ParameterFactory
from megatron_lite.training.stages import check_groups
from megatron_lite.utils.errors import ConfigError

BARE = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 64,
    "no_weight_tying": True,
    "norm": "non_parametric_layernorm",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "data_path": "x",
}
"""A model of matrices only."""


def plans(**keys: object) -> list[LayerPlan]:
    config = config_from_keys(BARE | keys, world_size=1).model
    return layer_plans(config, ParameterFactory(0, device=torch.device("meta")))


@pytest.mark.parametrize("keys", [{}, {"use_bias_in_mlp": True, "use_bias_in_head": True}], ids=str)
def test_stages_of_one_kind(keys: dict[str, object]) -> None:
    layers = plans(**keys)
    check_groups(layers, [0, 2, len(layers)])


def test_a_stage_that_would_wait_for_ever_is_refused() -> None:
    layers = plans(use_bias_in_head=True)
    check_groups(layers, [0, len(layers)])
    with pytest.raises(ConfigError, match=r"stage 0 would have no parameters .* stage 1 has some"):
        check_groups(layers, [0, 2, len(layers)])


def test_experts_that_are_divided_have_groups_of_their_own() -> None:
    """Their biases are in every stage, and the head's is alone in its group: two stages waited for ever."""
    biases = {"use_bias_in_mlp": True, "use_bias_in_head": True}
    layers = plans(**biases, moe_num_experts=2, expert_interval=1)
    check_groups(layers, [0, 2, len(layers)], divides_experts=False)
    with pytest.raises(ConfigError, match=r"stage 0 would have no parameters .* stage 1 has some"):
        check_groups(layers, [0, 2, len(layers)], divides_experts=True)
