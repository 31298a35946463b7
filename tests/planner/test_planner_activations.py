"""The formula of what the forward pass keeps, against the tensors that a real forward pass leaves."""

from __future__ import annotations

from typing import Any

from ranks import run_ranks

from megatron_lite.config import Config, config_from_keys
from megatron_lite.planner.activations import activation_bytes

TENSOR_RANKS = 2
KEYS: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "pos_emb": "learned",
    "vocab_size": 128,
    "train_micro_batch_size_per_gpu": 3,
    "model_parallel_size": TENSOR_RANKS,
    "checkpoint_activations": True,
    "data_path": "unused",
}
CASES = [(depth, sequence_parallel) for sequence_parallel in (False, True) for depth in (2, 10)]


def make(depth: int, sequence_parallel: bool) -> Config:
    keys = {**KEYS, "num_layers": depth, "sequence_parallel": sequence_parallel}
    return config_from_keys(keys, world_size=TENSOR_RANKS)


def kept_after_forward() -> list[int]:
    """By case, the bytes of the floating-point tensors that a forward pass leaves."""
    import torch

    from megatron_lite.model import build_gpt
    from megatron_lite.parallel.context import arrange, context_from_environment
    from megatron_lite.parallel.parameter import ParameterFactory
    from megatron_lite.parallel.tensor import TensorParallel

    found = []
    for case in CASES:
        config = make(*case)
        axis = arrange(context_from_environment(), config.parallel).tensor
        tensor = TensorParallel(axis, config.parallel.sequence_parallel)
        model = build_gpt(config, ParameterFactory(1, torch.float32, tensor=tensor))
        tokens = torch.zeros(3, 32, dtype=torch.int64)
        before = alive()
        logits = model(tokens)
        found.append(sum(size for place, size in alive().items() if place not in before))
        del logits
    return found


def alive() -> dict[int, int]:
    """Bytes by address of the memory behind every floating-point tensor."""
    import gc

    import torch

    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.is_floating_point()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_recomputed_layers_keep_their_input_or_a_slice_of_it() -> None:
    formula = [activation_bytes(make(*case), on_gpu=False) for case in CASES]
    eight_layers = [formula[1] - formula[0], formula[3] - formula[2]]
    assert eight_layers[0] == 2 * eight_layers[1] > 0
    for left in run_ranks(kept_after_forward, TENSOR_RANKS):
        assert [left[1] - left[0], left[3] - left[2]] == eight_layers
