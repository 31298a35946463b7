"""How many parameters a model has, by formula, without building it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_lite.config import Config


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by place; one entry of each kind of layer in the model's list of layers.

    Attributes:
        token_embedding: rows of the padded vocabulary x hidden size.
        position_embedding: learned positions; 0 for all other kinds.
        layer: parameters of one transformer layer with an MLP (all these are alike).
        layers: number of them.
        final_norm: the norm before the head.
        head: the output matrix; 0 when it is tied to the token embedding.
        head_bias: its bias; 0 without.
        mixture: parameters of one transformer layer with experts, without the experts.
        mixtures: number of them.
        expert: parameters of one expert.
        experts: experts of each such layer.
        chosen_experts: experts that one token meets there.
    """

    token_embedding: int
    position_embedding: int
    layer: int
    layers: int
    final_norm: int
    head: int
    head_bias: int = 0
    mixture: int = 0
    mixtures: int = 0
    expert: int = 0
    experts: int = 0
    chosen_experts: int = 0

    @property
    def in_experts(self) -> int:
        """All experts' parameters."""
        return self.mixtures * self.experts * self.expert

    @property
    def total(self) -> int:
        """All parameters."""
        embeddings = self.token_embedding + self.position_embedding
        layers = self.layers * self.layer + self.mixtures * self.mixture + self.in_experts
        return embeddings + layers + self.final_norm + self.head + self.head_bias

    @property
    def active(self) -> int:
        """Parameters that take part in computing one token: of the experts only the chosen ones."""
        return self.total - self.in_experts + self.mixtures * self.chosen_experts * self.expert

    @property
    def in_matmuls(self) -> int:
        """Parameters that every token is multiplied with: the layers, the norms and the head, tied or not.

        A lookup in an embedding is no multiplication, so neither embedding counts, unless the token
        embedding is the head as well. Of experts those count that one token meets.
        """
        lookups = self.position_embedding + (self.token_embedding if self.head else 0)
        return self.active - lookups


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _norm(config: Config) -> int:
    """A norm of the residual stream; of all kinds a layernorm alone has a bias."""
    has_bias = config.model.norm == "layernorm" and config.model.use_bias_in_norms
    return _norm_weights(config, config.model.hidden_size) + (config.model.hidden_size if has_bias else 0)


def _norm_weights(config: Config, width: int) -> int:
    return {"scalenorm": 1, "non_parametric_layernorm": 0}.get(config.model.norm, width)


def head_norms(config: Config) -> int:
    """The norms of queries and keys of a layer: one for all query heads, one for all key heads, no bias."""
    return 2 * _norm_weights(config, config.model.head_size) if config.model.use_qk_layernorm else 0


def _around_mlp(config: Config, tensor: int) -> int:
    """Attention and norms of one layer on one of ``tensor`` ranks, which has one key head at least."""
    model = config.model
    query_width = model.num_attention_heads // tensor * model.head_size
    key_value_width = -(-model.num_kv_heads // tensor) * model.head_size
    attention = _linear(model.hidden_size, query_width + 2 * key_value_width, model.use_bias_in_qkv)
    attention += _linear(query_width, model.hidden_size, model.use_bias_in_attn_output)
    attention += head_norms(config)
    norms = 1 if model.gpt_j_residual and model.gpt_j_tied else 2
    return attention + norms * _norm(config)


def _mlp(config: Config, tensor: int) -> int:
    """An MLP on one of ``tensor`` ranks, with the whole of its last bias."""
    model = config.model
    inner = model.ffn_size // tensor
    projections = 2 if model.is_gated else 1
    mlp = _linear(model.hidden_size, projections * inner, model.use_bias_in_mlp)
    return mlp + _linear(inner, model.hidden_size, model.use_bias_in_mlp)


def _expert(config: Config, tensor: int) -> int:
    """An expert: an MLP whose last bias is divided, too."""
    elsewhere = config.model.hidden_size - config.model.hidden_size // tensor
    return _mlp(config, tensor) - (elsewhere if config.model.use_bias_in_mlp else 0)


def parameters_by_place(config: Config) -> ParameterCount:
    """The parameter count of ``config``'s model by place. ``vocab_size`` must be known.

    Source: the shapes of Radford et al. 2019 (GPT-2) and Black et al. 2022 (GPT-NeoX-20B, arXiv 2204.06745).
    """
    return _by_place(config, 1)


def _by_place(config: Config, tensor: int) -> ParameterCount:
    """What one of ``tensor`` ranks has: its share of the matrices, all of norms and routers."""
    model = config.model
    embedding = model.padded_vocab_size // tensor * model.hidden_size
    positions = model.max_position_embeddings + model.opt_pos_emb_offset if model.pos_emb == "learned" else 0
    around_mlp = _around_mlp(config, tensor)
    return ParameterCount(
        token_embedding=embedding,
        position_embedding=positions * model.hidden_size,
        layer=around_mlp + _mlp(config, tensor),
        layers=model.mlp_kinds.count("dense"),
        final_norm=_norm(config),
        head=embedding if model.no_weight_tying else 0,
        head_bias=model.padded_vocab_size // tensor if model.use_bias_in_head else 0,
        mixture=around_mlp + model.moe_num_experts * model.hidden_size,
        mixtures=model.mlp_kinds.count("experts"),
        expert=_expert(config, tensor),
        experts=model.moe_num_experts,
        chosen_experts=model.moe_top_k,
    )


def parameters_on_rank(config: Config) -> ParameterCount:
    """Those of the rank that has most, ZeRO apart.

    Tensor ranks share matrices, pipeline stages layers, expert ranks the experts of a layer. Of several
    stages none has both ends of the model.
    """
    parallel = config.parallel
    count, stages = _by_place(config, parallel.model_parallel_size), max(parallel.pipe_parallel_size, 1)
    return replace(
        count,
        layers=-(-count.layers // stages),
        mixtures=-(-count.mixtures // stages),
        experts=count.experts // parallel.expert_parallel_size,
        head=count.head if stages == 1 else 0,
    )


def count_parameters(config: Config) -> int:
    """Number of parameters of ``config``'s model, tied ones counted once, vocabulary padding included."""
    return parameters_by_place(config).total
