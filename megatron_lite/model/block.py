"""One transformer block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.model.attention import ATTENTION_KINDS
from megatron_lite.model.mlp import MLP
from megatron_lite.model.moe import MixtureOfExperts
from megatron_lite.model.norms import hidden_norm
from megatron_lite.model.positions import POSITIONS
from megatron_lite.model.rotary import Rotation
from megatron_lite.parallel.parameter import ParameterFactory

if TYPE_CHECKING:
    from megatron_lite.config.sections.model import ModelSection
    from megatron_lite.model.cache import KVCache
    from megatron_lite.model.places import Places

MLP_KINDS: dict[str, type[MLP] | type[MixtureOfExperts]] = {"dense": MLP, "experts": MixtureOfExperts}
"""Kind in ``ModelSection.mlp_kinds`` → class, built with (config, factory). To add one: a line here."""


class Block(nn.Module):
    """Attention and MLP around the residual stream."""

    def __init__(self, config: ModelSection, index: int, factory: ParameterFactory) -> None:
        super().__init__()
        self.tensor = factory.tensor
        self.parallel = config.gpt_j_residual
        self.dropout = config.hidden_dropout
        tied = config.gpt_j_residual and config.gpt_j_tied
        kind = ATTENTION_KINDS[config.attention_kinds[index]]
        make_rotary = POSITIONS[config.pos_emb].rotary
        self.rotary = make_rotary(config) if make_rotary else None
        self.input_layernorm = hidden_norm(config, factory.child("input_layernorm"))
        self.attention = kind(config, index, factory.child("attention"))
        self.post_attention_layernorm = (
            None if tied else hidden_norm(config, factory.child("post_attention_layernorm"))
        )
        self.mlp = MLP_KINDS[config.mlp_kinds[index]](config, factory.child("mlp"))
        self.compiled = torch.compile(self.compute) if config.torch_compile else None

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, places: Places | None = None
    ) -> torch.Tensor:
        """``x [b, s, hidden] → [b, s, hidden]``, or a slice of the sequence of both (``sequence_parallel``).

        Sequential residual (GPT-2, Llama)::

            x ──┬── norm ── attention ── dropout ──(+)──┬── norm ── MLP ── dropout ──(+)── x'
                └───────────────────────────────────┘   └────────────────────────────┘

        Parallel residual (``gpt_j_residual``; GPT-J, GPT-NeoX-20B, Pythia)::

                ┌── norm ── attention ── dropout ──┐
            x ──┼──────────────────────────────────(+)── x'
                └── norm ── MLP ── dropout ────────┘

        With ``gpt_j_tied`` both branches of the parallel residual read one norm.
        """
        # The table of angles is looked up here, outside of what torch.compile sees.
        length = self.tensor.whole_length(x)
        rotation = self.rotary.rotation(x, length, cache, places) if self.rotary else None
        if self.compiled is not None and cache is None:
            return self.compiled(x, rotation, None, places)
        return self.compute(x, rotation, cache, places)

    def compute(
        self,
        x: torch.Tensor,
        rotation: Rotation | None,
        cache: KVCache | None = None,
        places: Places | None = None,
    ) -> torch.Tensor:
        """The block proper: what :meth:`forward` draws."""
        normed = self.input_layernorm(x)
        attended = self.drop(self.attention(normed, rotation, cache, places))
        if not self.parallel:
            x = x + attended
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(x)
        expanded = self.drop(self.mlp(normed))
        return x + attended + expanded if self.parallel else x + expanded

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """``hidden_dropout`` while training."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x
