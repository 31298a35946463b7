"""How much memory the forward pass keeps for the backward pass, by formula.

The list of what is kept is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) for this project's
blocks: the inputs of every norm, matrix product, attention and activation function, without the attention
matrix, which the fused attention kernels never write. All widths are elements per token.
"""

from __future__ import annotations

from megatron_lite.config import Config


def kept_by_layer(config: Config) -> int:
    """Elements per token that one transformer layer keeps, dropout masks not included."""
    model = config.model
    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_size
    key_value = model.num_kv_heads * model.head_size
    norms = (3 if model.gpt_j_residual else 4) * hidden  # input and output of each; parallel: one input
    attention = (query + 2 * key_value) + query  # the fused projection, and the attention's output
    if model.pos_emb == "rotary":
        attention += query + key_value  # the rotated copies
    mlp = (4 if model.is_gated else 2) * model.ffn_size
    return norms + attention + mlp


def activation_bytes(config: Config, on_gpu: bool) -> int:
    """Bytes that one micro-batch's activations take at the end of the forward pass, logits not included.

    With checkpointing only each chunk's input is kept, and one chunk of ``checkpoint_num_layers`` is computed
    again at a time. The gradients of the widest activation on their way back are included.
    """
    model = config.model
    tokens = config.batch.train_micro_batch_size_per_gpu * model.seq_length
    element = 4 if config.precision.precision == "fp32" else 2
    layer = kept_by_layer(config) * element + _dropout_bytes(config, on_gpu, element)
    in_flight = 2 * (2 if model.is_gated else 1) * model.ffn_size * element
    if model.checkpoint_activations:
        chunk = min(model.checkpoint_num_layers, model.num_layers)
        inputs = -(-model.num_layers // chunk) * model.hidden_size * element
        return tokens * (inputs + chunk * layer + in_flight)
    return tokens * (model.num_layers * layer + in_flight)


def _dropout_bytes(config: Config, on_gpu: bool, element: int) -> int:
    """Bytes per token and layer of the dropout masks, and of what attention keeps when it drops.

    The CPU's fused attention kernel has no dropout: there torch writes the whole attention matrix, twice, and its mask.
    """
    model = config.model
    masks = 2 * model.hidden_size if model.hidden_dropout else 0
    if model.attention_dropout and not on_gpu:
        masks += model.num_attention_heads * model.seq_length * (2 * element + 1)
    return masks


def logits_bytes(config: Config) -> int:
    """Bytes of the logits at the peak of the loss: themselves, their fp32 copy, log-probabilities, gradients."""
    model = config.model
    tokens = config.batch.train_micro_batch_size_per_gpu * model.seq_length
    per_logit = 12 if config.precision.precision == "fp32" else 16
    return tokens * model.padded_vocab_size * per_logit
