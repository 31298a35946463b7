"""Keys of the model: its shape and its parts."""

from __future__ import annotations

from typing import Any, Literal

from megatron_lite.config.attention import attention_kinds, attention_windows
from megatron_lite.config.fields import (
    Bool,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    derived,
)
from megatron_lite.config.sections.rope import RopeScaling

Init = Literal[
    "normal",
    "scaled_normal",
    "single_residual_scaled_normal",
    "small_init",
    "wang_init",
    "xavier_uniform",
    "xavier_normal",
    "orthogonal",
    "scaled_orthogonal",
]

GATED = frozenset({"geglu", "reglu", "swiglu", "glu", "bilinear"})
"""Activations whose MLP multiplies one half of its input projection by the activation of the other."""


def ffn_size(intermediate_size: int, activation: str, multiple_of: int) -> int:
    """Inner width of an MLP, by GPT-NeoX's rule."""
    width = -(-(intermediate_size * 2 // 3) // 2) if activation in GATED else intermediate_size
    return -(-width // multiple_of) * multiple_of


class ModelSection(Section):
    """The transformer."""

    num_layers: Positive
    """Number of transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Number of (query) attention heads; divides `hidden_size`, unless `kv_channels` is given."""
    num_kv_heads: Positive = derived("num_attention_heads")
    """Number of key/value heads: fewer than `num_attention_heads` is grouped-query attention, 1 is
    multi-query."""
    kv_channels: Positive | None = None
    """Width of an attention head (Megatron's name; Hugging Face's `head_dim`). None: `hidden_size` /
    `num_attention_heads`."""
    seq_length: Positive
    """Tokens in a training sequence."""
    max_position_embeddings: Positive = derived("seq_length")
    """Longest sequence the positions are made for (the size of a learned position table)."""
    expansion_factor: PositiveFloat = 4.0
    """`intermediate_size` as a multiple of `hidden_size`, when `intermediate_size` is not given."""
    intermediate_size: Positive = derived("expansion_factor x hidden_size")
    """Width of the MLP. A gated MLP has a third of it inside, as in GPT-NeoX: a model with an inner width of
    11008 has `intermediate_size: 33024`."""
    mlp_multiple_of: Positive = 1
    """Round the inner width of the MLP up to a multiple of this."""
    norm: Literal["layernorm", "rmsnorm", "non_parametric_layernorm", "scalenorm"] = "layernorm"
    """Kind of normalisation. `non_parametric_layernorm` has no weights (OLMo), `scalenorm` one number."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of `layernorm` and `non_parametric_layernorm`."""
    rms_norm_epsilon: PositiveFloat = 1e-8
    """Epsilon of `rmsnorm`."""
    scalenorm_epsilon: PositiveFloat = 1e-8
    """Smallest length that `scalenorm` divides by."""
    use_qk_layernorm: Bool = False
    """Normalise the queries and keys of every head."""
    pos_emb: Literal["learned", "rotary", "sinusoidal", "none"] = "learned"
    """Kind of position embedding."""
    opt_pos_emb_offset: NonNegative = 0
    """Row of the learned positions that the first token has; there are as many rows more (OPT: 2)."""
    rotary_pct: Fraction = 1.0
    """Part of each head's dimensions that rotates."""
    rotary_emb_base: PositiveFloat = 10000
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """Other rotary frequencies, for longer sequences than the model was first trained with, in Hugging Face's
    spelling: `{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 4096}`."""
    activation: Literal[
        "gelu",
        "gelu_tanh",
        "relu",
        "silu",
        "swish",
        "mish",
        "softsign",
        "geglu",
        "reglu",
        "swiglu",
        "glu",
        "bilinear",
    ] = "gelu"
    """Activation of the MLP; `geglu`, `reglu`, `swiglu`, `glu` and `bilinear` are gated."""
    gpt_j_residual: Bool = False
    """Parallel residual: attention and MLP both read the layer's input, x + attn(ln1(x)) + mlp(ln2(x))."""
    gpt_j_tied: Bool = False
    """With `gpt_j_residual`: one norm for both, x + attn(ln(x)) + mlp(ln(x))."""
    no_weight_tying: Bool = False
    """Give the output head weights of its own instead of the embedding's."""
    use_bias_in_norms: Bool = True
    """Give layer norms a bias."""
    use_bias_in_attn_linear: Bool = True
    """Give the attention's projections a bias."""
    use_bias_in_qkv: Bool = derived("use_bias_in_attn_linear")
    """Give the projection to queries, keys and values a bias (Qwen 2: only there)."""
    use_bias_in_attn_output: Bool = derived("use_bias_in_attn_linear")
    """Give the attention's output projection a bias (GPT-Neo: only there)."""
    use_bias_in_mlp: Bool = True
    """Give the MLP's projections a bias."""
    use_bias_in_head: Bool = False
    """Give the output head, which then has weights of its own (`no_weight_tying`), a bias (GPT-J, Phi)."""
    hidden_dropout: Probability = 0.0
    """Dropout after the embedding, the attention and the MLP."""
    attention_dropout: Probability = 0.0
    """Dropout of the attention probabilities."""
    moe_num_experts: Positive = 1
    """Experts of a layer with experts, each an MLP like that of the other layers; 1: there are none."""
    moe_top_k: Positive = 1
    """Experts that each token goes to. No token is dropped."""
    expert_interval: Positive = 2
    """Every so many layers one has experts, beginning with the first; 1: every layer."""
    moe_loss_coeff: NonNegativeFloat = 0.1
    """How strongly the experts are kept evenly used. The loss that this multiplies, 1 for an even use, is a
    mean over sequences and layers with experts; it acts on the gradient and is not in the reported loss."""
    init_method: Init = "normal"
    """How weights begin: `normal` (std `init_method_std`), `scaled_normal` (std / sqrt(2 num_layers)),
    `small_init` (std sqrt(2 / (5 hidden_size))), `wang_init` (std 2 / (num_layers sqrt(hidden_size)))."""
    output_layer_init_method: Init = "scaled_normal"
    """The same for the projections that write into the residual stream."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of `normal` and `scaled_normal`."""
    causal: Bool = derived("unless mlm_training")
    """Whether a token sees only those before it. False, attention in both directions (BERT), belongs to
    `mlm_training`: a model that is to foretell the next token must not see it."""
    attention_config: list[Any] | None = None
    """Kind of attention per layer, as [[[kinds], repeats], ...]: `[[[global], 12]]`, or `[[[global], all]]`.
    Kinds: `global`; `flash` is global attention too; `local` sees `sliding_window_width` tokens. None: global
    everywhere."""
    sliding_window_width: Positive | None = None
    """Tokens that a token sees, itself included, as Hugging Face counts them (GPT-NeoX sees one more); with
    `mlm_training` on either side. Of `local` layers if `attention_config` names any, else of all layers.
    None: all."""
    attention_scale: PositiveFloat | None = None
    """What scores, products of a query and a key, are multiplied by before the softmax. None: 1 / sqrt(width
    of a head). GPT-Neo has 1.0."""
    attention_backend: Literal["auto", "sdpa", "flash_attn"] = "auto"
    """Kernel of the attention. `auto`: flash-attn where it is installed and fits, torch's SDPA otherwise."""
    torch_compile: Bool = False
    """Compile every block with torch.compile: faster steps on CUDA, a minute of start-up."""
    checkpoint_activations: Bool = False
    """Keep only the inputs of layers and recompute the rest in the backward pass: less memory, a third more
    work."""
    checkpoint_num_layers: Positive = 1
    """Layers recomputed together."""
    vocab_size: Positive | None = None
    """Number of tokens. None: the tokenizer's."""
    make_vocab_size_divisible_by: Positive = 128
    """Pad the embedding to a multiple of this many rows."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def is_gated(self) -> bool:
        """Whether the MLP is gated."""
        return self.activation in GATED

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP, the input width of its down projection (a gated MLP projects up to twice
        it)."""
        return ffn_size(self.intermediate_size, self.activation, self.mlp_multiple_of)

    @property
    def norm_epsilon(self) -> float:
        """Epsilon of the chosen norm."""
        epsilons = {"rmsnorm": self.rms_norm_epsilon, "scalenorm": self.scalenorm_epsilon}
        return epsilons.get(self.norm, self.layernorm_epsilon)

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """The kind of attention of every layer."""
        return attention_kinds(self.attention_config, self.num_layers)

    @property
    def mlp_kinds(self) -> tuple[str, ...]:
        """What each layer has behind its attention: `dense`, an MLP, or `experts`."""
        mixed = self.moe_num_experts > 1
        return tuple(
            "experts" if mixed and index % self.expert_interval == 0 else "dense"
            for index in range(self.num_layers)
        )

    @property
    def attention_windows(self) -> tuple[int | None, ...]:
        """How many tokens the attention of every layer sees on one side, its own included; None: all."""
        return attention_windows(self.attention_kinds, self.sliding_window_width)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up; the same under every layout."""
        assert self.vocab_size is not None, (
            "vocab_size is known once the tokenizer is: Config.with_keys(vocab_size=...)"
        )
        return -(-self.vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by
