"""How many parameters a model has, by formula, without building it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config import Config


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by place; one entry of each kind of layer in the model's list of layers.

    Attributes:
        token_embedding: rows of the padded vocabulary x hidden size.
        position_embedding: learned positions; 0 for rotary and no positions.
        layer: parameters of one transformer layer (all layers are alike).
        layers: number of transformer layers.
        final_norm: the norm before the head.
        head: the output matrix; 0 when it is tied to the token embedding.
    """

    token_embedding: int
    position_embedding: int
    layer: int
    layers: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        embeddings = self.token_embedding + self.position_embedding
        return embeddings + self.layers * self.layer + self.final_norm + self.head

    @property
    def in_matmuls(self) -> int:
        """Parameters that every token is multiplied with: the layers, the norms and the head, tied or not.

        A lookup in an embedding is no multiplication, so neither embedding counts, unless the token
        embedding is the head as well.
        """
        head = self.head or self.token_embedding
        return self.layers * self.layer + self.final_norm + head


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _norm(config: Config) -> int:
    """A norm of the residual stream; an RMSNorm has no bias."""
    has_bias = config.model.norm == "layernorm" and config.model.use_bias_in_norms
    return config.model.hidden_size * (2 if has_bias else 1)


def _layer(config: Config) -> int:
    model = config.model
    query_width = model.num_attention_heads * model.head_size
    key_value_width = model.num_kv_heads * model.head_size
    attention = _linear(model.hidden_size, query_width + 2 * key_value_width, model.use_bias_in_attn_linear)
    attention += _linear(query_width, model.hidden_size, model.use_bias_in_attn_linear)
    if model.use_qk_layernorm:
        attention += 2 * model.head_size  # one weight for all query heads, one for all key heads, no bias
    projections = 2 if model.is_gated else 1
    mlp = _linear(model.hidden_size, projections * model.ffn_size, model.use_bias_in_mlp)
    mlp += _linear(model.ffn_size, model.hidden_size, model.use_bias_in_mlp)
    norms = 1 if model.gpt_j_residual and model.gpt_j_tied else 2
    return attention + mlp + norms * _norm(config)


def parameters_by_place(config: Config) -> ParameterCount:
    """The parameter count of ``config``'s model by place. ``vocab_size`` must be known.

    Source: the shapes of Radford et al. 2019 (GPT-2) and Black et al. 2022 (GPT-NeoX-20B, arXiv 2204.06745).
    """
    model = config.model
    embedding = model.padded_vocab_size * model.hidden_size
    learned = model.pos_emb == "learned"
    return ParameterCount(
        token_embedding=embedding,
        position_embedding=model.max_position_embeddings * model.hidden_size if learned else 0,
        layer=_layer(config),
        layers=model.num_layers,
        final_norm=_norm(config),
        head=embedding if model.no_weight_tying else 0,
    )


def parameters_on_rank(config: Config) -> ParameterCount:
    """Those of the rank that has most, ZeRO apart: tensor ranks share matrices, pipeline stages layers.

    Norms and biases, a thousandth of a layer, are counted as if they were shared as well. Of several stages
    none has both ends of the model.
    """
    count, tensor = parameters_by_place(config), config.parallel.model_parallel_size
    stages = max(config.parallel.pipe_parallel_size, 1)
    return ParameterCount(
        token_embedding=-(-count.token_embedding // tensor),
        position_embedding=count.position_embedding,
        layer=-(-count.layer // tensor),
        layers=-(-count.layers // stages),
        final_norm=count.final_norm,
        head=-(-count.head // tensor) if stages == 1 else 0,
    )


def count_parameters(config: Config) -> int:
    """Number of parameters of ``config``'s model, tied ones counted once, vocabulary padding included."""
    return parameters_by_place(config).total
