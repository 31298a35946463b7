"""Parts that most families' config.json have in common."""

from __future__ import annotations

from megatron_lite.hf.parts import Always, Choice, Demanded, Part, Same


def shape(
    layers: str = "num_hidden_layers",
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    positions: str = "max_position_embeddings",
    deviation: str = "initializer_range",
    default_deviation: float = 0.02,
) -> tuple[Part, ...]:
    """The sizes of a model, by the names that its family has for them."""
    return (
        Same(layers, "num_layers"),
        Same(hidden, "hidden_size"),
        Same(heads, "num_attention_heads"),
        Same(positions, "max_position_embeddings"),
        Same(deviation, "init_method_std", default_deviation),
    )


SHAPE = shape()

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
"""Our activation → ``hidden_act``, of an MLP that is not gated."""

READ_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items() if ours != "swish"} | {
    "swish": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu",
}  # fmt: skip
"""The other way: theirs has several names of one function."""

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
"""Our gated activation → ``hidden_act``."""

READ_GATED = {theirs: ours for ours, theirs in GATED.items()} | {"swish": "swiglu"}

ACTIVATION = Choice("hidden_act", "activation", READ_ACTIVATIONS, ACTIVATIONS)
GATED_ACTIVATION = Choice("hidden_act", "activation", READ_GATED, GATED)


def gpt2_activation(default: str = "gelu_new") -> Part:
    """The activation, by the names that GPT-2 and its descendants have for field and function."""
    return Choice(
        "activation_function",
        "activation",
        READ_ACTIVATIONS,
        ACTIVATIONS | {"gelu_tanh": "gelu_new"},
        default,
    )


def tied_by_default(tied: bool) -> Part:
    """Whether the head is the embedding; ``tied``: what the family takes without the field."""
    return Choice(
        "tie_word_embeddings", "no_weight_tying", {True: False, False: True}, {True: False, False: True}, tied
    )


BIASED_HEAD: tuple[Part, ...] = (
    Always({"no_weight_tying": True, "use_bias_in_head": True}),
    Demanded("tie_word_embeddings", False, default=False),
)
"""A head of its own with a bias."""
