"""What stands between the MLP's two matrices.

Each function maps the output of ``dense_h_to_4h`` to the input of ``dense_4h_to_h``. A gated one takes twice
the width, [gate; up], and returns act(gate) · up (Shazeer, arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, as GPT-2 and GPT-NeoX's fused kernel have it."""
    return F.gelu(x, approximate="tanh")


def gated(activation: Activation | None) -> Activation:
    """``x [..., 2n] → activation(x[..., :n]) · x[..., n:]``; the identity when ``activation`` is None."""

    def gate(x: torch.Tensor) -> torch.Tensor:
        control, value = x.chunk(2, dim=-1)
        return (activation(control) if activation else control) * value

    return gate


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "softsign": F.softsign,
    "swiglu": gated(F.silu),
    "geglu": gated(F.gelu),
    "reglu": gated(F.relu),
    "glu": gated(torch.sigmoid),
    "bilinear": gated(None),
}
"""``activation`` → function. To add one: a line here (a gated one is also named in the configuration)."""
