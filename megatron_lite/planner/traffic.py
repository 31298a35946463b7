"""How many bytes a rank sends in a step, by kind of parallelism, by formula.

The mean over the ranks, for one optimizer step of ``train_batch_size`` samples, by the convention of
:mod:`megatron_lite.parallel.traffic`: over n ranks a sum of a tensor sends 2 (n - 1) / n of it, a gather or a
scattered sum (n - 1) / n of the whole, an all-to-all (n - 1) / n of what a rank has.

Sources: tensor parallelism Shoeybi et al. (arXiv 1909.08053, section 3), its sequence parallelism Korthikanti
et al. (2205.05198, section 4.2), stages Narayanan et al. (2104.04473, section 3.2), ZeRO Rajbhandari et al.
(1910.02054, section 7), Ulysses Jacobs et al. (2309.14509, section 3.2), rings Liu et al. (2310.01889,
section 3), experts Lepikhin et al. (2006.16668, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from megatron_lite.config import Config
from megatron_lite.planner.activations import element_bytes, micro_batch_tokens, sequence_slices
from megatron_lite.planner.parameters import head_norms, parameters_by_place
from megatron_lite.planner.swap import swap_keys

FP32 = 4

WIDTHS: dict[str | None, int] = {"fp32": FP32, "fp16": 2, "bf16": 2}
"""Bytes of a gradient on its way between replicas, where ``communication_data_type`` says so."""

REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_reuse_distance``, in parameters."""


def step_traffic(config: Config, micro_batches: float) -> dict[str, float]:
    """Bytes that a rank sends in a step, by the names of :class:`megatron_lite.parallel.traffic.Traffic`.

    ``micro_batches`` is how many a rank has in a step: ``gradient_accumulation_steps``, or fewer while
    ``rampup_batch_size`` grows. ``vocab_size`` must be known. A ring sends less where documents are kept
    apart. Left out are norms, losses and flags
    (``control``).
    """
    split = config.parallel.sequence_parallel
    per_micro_batch: dict[str, float] = {
        "tensor": _loss(config) + _gradient_shares(config) + (0 if split else _sums(config)),
        "sequence": _slices(config) if split else 0,
        "expert": _rows_of_experts(config),
        "context": _heads_or_keys(config),
        "pipe": _activations_between_stages(config),
    }
    found = {kind: micro_batches * size for kind, size in per_micro_batch.items()}
    found["pipe"] += _tied_weights(config)
    found["data"] = _replicas(config, micro_batches)
    return {kind: size for kind, size in found.items() if size}


def _share(ranks: int) -> float:
    """Of a whole over so many ranks, what others need of a rank."""
    return (ranks - 1) / ranks


def _stages(config: Config) -> int:
    return max(config.parallel.pipe_parallel_size, 1)


def residual_bytes(config: Config) -> float:
    """Bytes of the residual stream of a micro-batch."""
    return micro_batch_tokens(config) * config.model.hidden_size * element_bytes(config)


def _recomputed(config: Config) -> tuple[int, int]:
    """(blocks run again in the backward, chunks of them); a chunk's end is not computed again."""
    model = config.model
    if not model.checkpoint_activations:
        return 0, 0
    per_stage = -(-model.num_layers // _stages(config))
    chunks = -(-per_stage // min(model.checkpoint_num_layers, per_stage)) * _stages(config)
    return model.num_layers, chunks


def _sums(config: Config) -> float:
    """Without ``sequence_parallel``: sums. A block: 2 forward, 2 backward. The embedding: 1. The head: 1."""
    again, chunks = _recomputed(config)
    without_end = chunks if config.model.hidden_dropout == 0 else 0
    count = 4 * config.model.num_layers + 2 + 2 * again - without_end
    return 2 * _share(config.parallel.model_parallel_size) * count * residual_bytes(config) / _stages(config)


def _slices(config: Config) -> float:
    """With ``sequence_parallel``: gathers and scattered sums.

    A block: 4 forward, 4 backward, and both matrices' inputs gathered again (experts keep theirs). The
    embedding: 2. The head: 3.
    """
    again, chunks = _recomputed(config)
    without_end = chunks if config.model.hidden_dropout == 0 else 0
    count = 10 * config.model.num_layers - _mixtures(config) + 5 + 4 * again - without_end
    return _share(config.parallel.model_parallel_size) * count * residual_bytes(config) / _stages(config)


def _mixtures(config: Config) -> int:
    """Layers with experts."""
    return config.model.mlp_kinds.count("experts")


def _rows_of_experts(config: Config) -> float:
    """Tokens, once for each expert that they go to, there and back, forward, backward and when recomputed.

    The mean over ranks whose tokens choose alike: however uneven the choice, what one rank's experts get more
    of the others, another's get less.
    """
    passes = 6 if config.model.checkpoint_activations else 4
    rows = config.model.moe_top_k * residual_bytes(config)
    share = _share(config.parallel.expert_parallel_size)
    return share * passes * _mixtures(config) * rows / _stages(config)


def _loss(config: Config) -> float:
    """The largest logit, the sum of exponentials and the label's logit of every token, in fp32."""
    tokens = micro_batch_tokens(config)
    return 2 * _share(config.parallel.model_parallel_size) * 3 * FP32 * tokens / _stages(config)


def _gradient_shares(config: Config) -> float:
    """Parameters whose gradient each tensor rank knows a share of, added up in fp32 in every backward."""
    tensor = config.parallel.model_parallel_size
    vectors = _Vectors.of(config)
    count = config.model.num_layers * vectors.of_heads + _mixtures(config) * vectors.router
    if config.parallel.sequence_parallel:
        positions = parameters_by_place(config).position_embedding
        count += config.model.num_layers * vectors.of_layer + vectors.final_norm + positions
        count -= _mixtures(config) * vectors.of_mlp
    if config.model.num_kv_heads < tensor:
        count += config.model.num_layers * _key_value_matrices(config)
    return 2 * _share(tensor) * FP32 * count / _stages(config)


def _key_value_matrices(config: Config) -> int:
    """Numbers of a layer's key and value projections."""
    model = config.model
    inputs = model.hidden_size + int(model.use_bias_in_qkv)
    return 2 * model.num_kv_heads * model.head_size * inputs


@dataclass(frozen=True)
class _Vectors:
    """Numbers that every tensor rank has whole.

    Attributes:
        of_layer: norms of the residual stream and biases that are added to it, of one layer.
        of_mlp: those of them that a layer with experts has not: the MLP's.
        router: the matrix that it has.
        of_heads: norms of queries and keys of one layer.
        final_norm: the norm before the head.
    """

    of_layer: int
    of_mlp: int
    router: int
    of_heads: int
    final_norm: int

    @staticmethod
    def of(config: Config) -> _Vectors:
        model, norm = config.model, parameters_by_place(config).final_norm
        norms = 1 if model.gpt_j_residual and model.gpt_j_tied else 2
        of_mlp = model.hidden_size * model.use_bias_in_mlp
        of_layer = norms * norm + model.hidden_size * model.use_bias_in_attn_output + of_mlp
        router = model.moe_num_experts * model.hidden_size
        return _Vectors(of_layer, of_mlp, router, head_norms(config), norm)


def _heads_or_keys(config: Config) -> float:
    """What the attention of ranks that share sequences exchanges: tokens for heads, or keys and values."""
    model, parallel = config.model, config.parallel
    ranks, tensor = parallel.context_parallel_size, parallel.model_parallel_size
    if ranks == 1:
        return 0.0
    again, _ = _recomputed(config)
    sequences = config.batch.train_micro_batch_size_per_gpu
    key_heads = max(1, model.num_kv_heads // tensor)
    if config.context_by_ring:
        # Forward the keys and values, backward these again and their gradients.
        length, causal = model.seq_length, model.causal
        sent = [_ring_keys(length, ranks, window, causal) for window in model.attention_windows]
        passes = 3 + again / model.num_layers
        numbers = passes * 2 * key_heads * model.head_size * sequences * sum(sent)
    else:
        # Queries, keys, values and the output; key heads that the ranks do not divide go several times.
        heads = 2 * model.num_attention_heads // tensor + 2 * lcm(key_heads, ranks)
        passes = 2 * model.num_layers + again
        numbers = passes * _share(ranks) * heads * model.head_size * micro_batch_tokens(config)
    return numbers * element_bytes(config) / _stages(config)


def _ring_keys(length: int, ranks: int, window: int | None, causal: bool) -> float:
    """Tokens of a sequence whose keys a rank sends to others, the mean over the ranks; one document a row.

    Of 2n chunks rank r has the r-th and the r-th last. A rank sends another what lies between the first and
    the last token that the other sees: without windows its first half to half of the others, else all; in
    both directions all.
    """
    chunk = length // (2 * ranks)
    total = 0
    for origin in range(ranks):
        for to in range(ranks):
            seen = []
            for half, key_chunk in enumerate((origin, 2 * ranks - 1 - origin)):
                for query_chunk in (to, 2 * ranks - 1 - to):
                    distance = (query_chunk - key_chunk) * chunk  # of the first query from the first key
                    reach = length if window is None else window - 1
                    first, last = max(0, distance - reach), min(chunk, distance + chunk + reach)
                    if first < last and (distance > 0 or not causal):
                        seen += [half * chunk + first, half * chunk + last]
            if seen and to != origin:
                total += max(seen) - min(seen)
    return total / ranks


def _activations_between_stages(config: Config) -> float:
    """The residual stream forward and its gradient backward over every boundary, mean over the stages."""
    return 2 * _share(_stages(config)) * residual_bytes(config) / sequence_slices(config)


def _tied_weights(config: Config) -> float:
    """First and last stage add up their gradients of a tied embedding, once a step, in fp32.

    With more than two replicas the first stage then sends the last one its weights.
    """
    stages = _stages(config)
    if stages == 1 or config.model.no_weight_tying:
        return 0.0
    matrix = parameters_by_place(config).token_embedding / config.parallel.model_parallel_size
    sent = _share(2) * matrix * 2 * FP32
    if config.parallel.replicas > 2:
        sent += _share(2) * matrix * element_bytes(config)
    return sent * 2 / stages


def mean_parameters(config: Config) -> float:
    """Parameters of a rank before ZeRO divides them, mean over the stages."""
    return _parameters_of_all(config) + _parameters_of_experts(config)


def _parameters_of_all(config: Config) -> float:
    """Those that every replica has."""
    count, tensor, stages = parameters_by_place(config), config.parallel.model_parallel_size, _stages(config)
    vectors = _Vectors.of(config)
    whole = vectors.of_layer + vectors.of_heads
    layer = whole + (count.layer - whole) / tensor
    whole += vectors.router - vectors.of_mlp
    mixture = whole + (count.mixture - whole) / tensor
    if config.model.num_kv_heads < tensor:
        copies = _key_value_matrices(config) * (1 / config.model.num_kv_heads - 1 / tensor)
        layer, mixture = layer + copies, mixture + copies
    matrices = 2 if stages > 1 and not config.model.no_weight_tying else 1
    ends = (matrices * count.token_embedding + count.head + count.head_bias) / tensor
    ends += count.position_embedding
    return (count.layers * layer + count.mixtures * mixture + ends + count.final_norm) / stages


def _parameters_of_experts(config: Config) -> float:
    """Those of the experts that a rank has."""
    parallel = config.parallel
    ranks = parallel.model_parallel_size * parallel.expert_parallel_size * _stages(config)
    return parameters_by_place(config).in_experts / ranks


def _replicas(config: Config, micro_batches: float) -> float:
    """Gradients and ZeRO's parameters among the replicas (data and context ranks), a step.

    The units are passes over the parameters: 2 for a sum, 1 for a gather or a sum that ends divided. ZeRO 2
    and 3 divide the gradients of every micro-batch, as ZeRO 3 gathers parameters for every pass. Divided
    experts are shared by fewer replicas.
    """
    replicas = config.parallel.replicas
    width, stage = element_bytes(config), config.engine_stage
    of_gradients = WIDTHS.get(config.deepspeed.communication_data_type, width)
    of_all = _share(replicas) * _parameters_of_all(config)
    of_experts = _share(replicas // config.parallel.expert_parallel_size) * _parameters_of_experts(config)
    if stage == 3:
        gathers, tied = _gathered(config)
        passed = (of_gradients + width * gathers) * (of_all + of_experts)
        return micro_batches * (passed + width * _share(replicas) * tied)
    gradients = {0: 2, 1: _reduction(config), 2: _reduction(config) * micro_batches}
    parameters = min(stage, 1)
    return (of_gradients * gradients[stage] + width * parameters) * (of_all + of_experts)


def _reduction(config: Config) -> int:
    """Passes to leave each replica its part of the gradients' sum: 1, or 2 where DeepSpeed sums them whole.

    It does so in bf16 at stage 1, unless the optimizer is offloaded, and where ``reduce_scatter`` is off
    (Muon needs that) or ``use_multi_rank_bucket_allreduce`` on.
    """
    has_buffer = config.engine_stage == 1 and not config.zero.offload_optimizer
    in_buffer = config.precision.precision == "bf16" and has_buffer
    block = config.zero.block
    whole = block.get("use_multi_rank_bucket_allreduce", False) or not block.get("reduce_scatter", True)
    return 2 if in_buffer or whole or config.optimizer.type == "muon" else 1


def _gathered(config: Config) -> tuple[float, float]:
    """How often ZeRO 3 gathers each parameter for a micro-batch, and numbers that it gathers once more.

    It gathers all forward and, unless they are kept, all backward.

    It keeps those that the backward needs within ``stage3_max_reuse_distance`` parameters, that is the last
    half of the distance. A tied matrix that is not kept is gathered at both of its places. Parameters of
    fewer numbers than ``stage3_param_persistence_threshold`` are kept all the time, and gathered after the
    update; that is left out here, since in a model worth dividing they are norms and biases.
    """
    count, numbers = parameters_by_place(config), mean_parameters(config)
    tied = 0 if count.head else count.token_embedding / config.parallel.model_parallel_size
    block = config.zero.block | swap_keys(config)
    kept = min(1.0, block.get("stage3_max_reuse_distance", REUSE_DISTANCE) / 2 / numbers)
    return 2 - kept, (1 - kept) * 2 * tied
