"""How much memory the forward pass keeps for the backward pass, by formula.

The list of what is kept is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) for this project's
blocks: the inputs of every norm, matrix product, attention and activation function, without the attention
matrix, which the fused attention kernels never write. Widths are elements per token.
"""

from __future__ import annotations

from megatron_lite.config import Config

LOSS_SLICE = 1 << 26
"""Logits that the loss turns into fp32 at a time on a GPU; on a CPU a cache's worth, which does not count."""


def element_bytes(config: Config) -> int:
    """Bytes of one number as the model computes with it: a parameter, an activation."""
    return 4 if config.precision.precision == "fp32" else 2


def micro_batch_tokens(config: Config) -> int:
    """Tokens that one rank holds the activations of."""
    tokens = config.batch.train_micro_batch_size_per_gpu * config.model.seq_length
    return tokens // config.parallel.context_parallel_size


def sequence_slices(config: Config) -> int:
    """Slices that the sequence of the residual stream is cut into: the tensor ranks that have one each."""
    return config.parallel.model_parallel_size if config.parallel.sequence_parallel else 1


def kept_by_layer(config: Config) -> int:
    """Elements per token that one transformer layer keeps on a rank, dropout masks not included.

    Tensor ranks share what is inside of attention and MLP; with ``sequence_parallel`` the rest, too. Where
    some layers have experts: the average of all layers, the tokens spread evenly over the experts. There a
    token's input is kept k times, and what k experts make of it.
    """
    model, parallel = config.model, config.parallel
    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_size
    key_value = model.num_kv_heads * model.head_size
    norms = 4 * hidden  # input and output of both
    if model.gpt_j_residual:
        norms = (2 if model.gpt_j_tied else 3) * hidden  # both read the same input
    attention = (query + 2 * key_value) + query  # the fused projection, and the attention's output
    if model.pos_emb == "rotary" or model.use_qk_layernorm:
        attention += query + key_value  # copies, turned or normed
    if parallel.context_parallel_size > 1 and not config.context_by_ring:
        attention += query  # the output before it is exchanged for tokens
    mlp = (4 if model.is_gated else 2) * model.ffn_size
    shares = parallel.model_parallel_size
    mixtures = model.mlp_kinds.count("experts")
    if mixtures:
        experts = model.moe_top_k * (mlp + 2 * hidden * shares)  # every tensor rank has whole rows
        mlp = (mixtures * experts + (model.num_layers - mixtures) * mlp) // model.num_layers
    return -(-norms // sequence_slices(config)) - (-(attention + mlp) // shares)


def activation_bytes(config: Config, on_gpu: bool) -> int:
    """Bytes of one micro-batch's activations at the end of the forward pass, logits not included.

    With checkpointing only each chunk's input is kept, with ``sequence_parallel`` a slice of it, and one
    chunk of ``checkpoint_num_layers`` is computed again at a time. The gradients of the widest activation on
    their way back are included.
    """
    model = config.model
    element = element_bytes(config)
    layer = kept_by_layer(config) * element + _dropout_bytes(config, on_gpu)
    rows = model.moe_top_k if "experts" in model.mlp_kinds else 1
    in_flight = 2 * rows * (2 if model.is_gated else 1) * model.ffn_size * element
    in_flight = -(-in_flight // config.parallel.model_parallel_size)
    layers = _layers_at_once(config)
    if not model.checkpoint_activations:
        return micro_batch_tokens(config) * (layers * layer + in_flight)
    chunk = min(model.checkpoint_num_layers, model.num_layers)
    inputs = -(-layers // chunk) * _residual_width(config) * element
    return micro_batch_tokens(config) * (inputs + chunk * layer + in_flight)


def _residual_width(config: Config) -> int:
    """Elements per token of the residual stream that a rank has: with ``sequence_parallel`` its share."""
    return -(-config.model.hidden_size // sequence_slices(config))


def _layers_at_once(config: Config) -> int:
    """Layers times micro-batches whose activations a rank keeps at a time.

    The first of p pipeline stages has begun p micro-batches, if there are so many, when it ends the first.
    """
    stages = max(config.parallel.pipe_parallel_size, 1)
    begun = min(stages, config.batch.gradient_accumulation_steps)
    return -(-config.model.num_layers // stages) * begun


def _dropout_bytes(config: Config, on_gpu: bool) -> int:
    """Bytes per token and layer of the dropout masks, and of what attention keeps when it drops.

    The CPU's fused attention kernel has no dropout: there torch writes the attention matrix twice, and its
    mask.
    """
    model = config.model
    masks = 2 * _residual_width(config) if model.hidden_dropout else 0
    if model.attention_dropout and not on_gpu:
        heads = model.num_attention_heads // config.parallel.model_parallel_size
        masks += heads * model.seq_length * (2 * element_bytes(config) + 1)
    return masks


def logits_bytes(config: Config, on_gpu: bool) -> int:
    """Bytes of the logits (their gradient is written over them) and of the loss's work on a slice of them."""
    logits = (
        micro_batch_tokens(config) * config.model.padded_vocab_size // config.parallel.model_parallel_size
    )
    return logits * element_bytes(config) + (8 * min(logits, LOSS_SLICE) if on_gpu else 0)
