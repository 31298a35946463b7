"""Checkpoints in GPT-NeoX's form, cut out of models of transformers by what its own model code computes.

By GPT-NeoX's ``megatron/model/transformer.py`` and ``gpt2_model.py``, and by DeepSpeed's ``PipelineModule``:
layer 0 is the embedding, 2 to L + 1 the blocks, L + 3 the final norm, L + 4 the head. Each tensor rank
computes with whole heads, a share of the inner channels and of the vocabulary. Written head by head,
on purpose otherwise than the program does.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

Layers = dict[int, dict[str, torch.Tensor]]
"""By number of the layer, what one rank has of it."""

VOCABULARY = 260


@torch.no_grad()
def tiny(model_type: str, **fields: Any) -> torch.nn.Module:
    """A random model of transformers: 2 layers of 4 heads of 8 channels."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape | fields)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        parameter.normal_(mean, 0.2, generator=generator)
    return model


def share(tensor: torch.Tensor, rank: int, ranks: int, dim: int = 0) -> torch.Tensor:
    """The ``rank``-th of ``ranks`` equal parts."""
    size = tensor.shape[dim] // ranks
    return tensor.narrow(dim, rank * size, size).clone()


def summand(bias: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Numbers of which those of all ranks make ``bias``, no two ranks' alike."""
    return bias * (2 * (rank + 1) / (ranks * (ranks + 1)))


def neox_layers(model: torch.nn.Module, rank: int, ranks: int) -> Layers:
    """What tensor rank ``rank`` has of a GPTNeoX model of transformers (names since August 2024)."""
    state, config = model.state_dict(), model.config
    added = summand if config.use_parallel_residual else lambda bias, *_: bias
    layers: Layers = {0: {"word_embeddings.weight": share(state["gpt_neox.embed_in.weight"], rank, ranks)}}
    for number in range(config.num_hidden_layers):
        old = f"gpt_neox.layers.{number}."
        layer = {"attention.rotary_emb.inv_freq": torch.rand(4)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer |= {f"{name}.{part}": state[f"{old}{name}.{part}"] for part in ("weight", "bias")}
        for theirs, ours in (
            ("attention.query_key_value", "attention.query_key_value"),
            ("mlp.dense_h_to_4h", "mlp.linear1"),
        ):
            for part in ("weight", "bias"):
                layer[f"{ours}.{part}"] = share(state[f"{old}{theirs}.{part}"], rank, ranks)
        for theirs, ours in (("attention.dense", "attention.dense"), ("mlp.dense_4h_to_h", "mlp.linear2")):
            layer[f"{ours}.weight"] = share(state[f"{old}{theirs}.weight"], rank, ranks, dim=1)
            layer[f"{ours}.bias"] = added(state[f"{old}{theirs}.bias"], rank, ranks)
        layers[2 + number] = layer
    end = 2 + config.num_hidden_layers
    layers[end + 1] = {
        f"norm.{part}": state[f"gpt_neox.final_layer_norm.{part}"] for part in ("weight", "bias")
    }
    if not config.tie_word_embeddings:
        head = state.get("embed_out.weight", state.get("lm_head.weight"))
        layers[end + 2] = {"final_linear.weight": share(head, rank, ranks)}
    return layers


def renamed(layers: Layers) -> Layers:
    """With the names of an ungated MLP until August 2024."""
    return {
        number: {
            key.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"): tensor
            for key, tensor in layer.items()
        }
        for number, layer in layers.items()
    }


def llama_layers(
    model: torch.nn.Module, rank: int, ranks: int, old_mlp: bool = False, old_heads: bool = False
) -> Layers:
    """What tensor rank ``rank`` has of a Llama model of transformers; ``old``: as until 2024."""
    state, config = model.state_dict(), model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layers: Layers = {0: {"word_embeddings.weight": share(state["model.embed_tokens.weight"], rank, ranks)}}
    for number in range(config.num_hidden_layers):
        old = f"model.layers.{number}."
        q, k, v = (state[f"{old}self_attn.{name}_proj.weight"].view(-1, 8, 32) for name in "qkv")
        own = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        keys = range(rank * groups // ranks, (rank + 1) * groups // ranks)
        if old_heads:
            each = heads // groups
            rows = []
            for head in own:
                part = slice(head % each * 8 // each, (head % each + 1) * 8 // each)
                rows += [q[head], k[head // each][part], v[head // each][part]]
        else:
            rows = [q[head] for head in own] + [k[head] for head in keys] + [v[head] for head in keys]
        gate, up = (share(state[f"{old}mlp.{name}_proj.weight"], rank, ranks) for name in ("gate", "up"))
        down = share(state[f"{old}mlp.down_proj.weight"], rank, ranks, dim=1)
        mlp = (
            {"mlp.w1.weight": gate, "mlp.w3.weight": up, "mlp.w2.weight": down}
            if old_mlp
            else {"mlp.linear1.weight": torch.cat([up, gate]), "mlp.linear2.weight": down}
        )
        if config.mlp_bias:
            biases = [share(state[f"{old}mlp.{name}_proj.bias"], rank, ranks) for name in ("up", "gate")]
            mlp["mlp.linear1.bias"] = torch.cat(biases)
            mlp["mlp.linear2.bias"] = state[f"{old}mlp.down_proj.bias"]
        layers[2 + number] = {
            "input_layernorm.scale": state[f"{old}input_layernorm.weight"],
            "post_attention_layernorm.scale": state[f"{old}post_attention_layernorm.weight"],
            "attention.query_key_value.weight": torch.cat(rows),
            "attention.dense.weight": share(state[f"{old}self_attn.o_proj.weight"], rank, ranks, dim=1),
            **mlp,
        }
    end = 2 + config.num_hidden_layers
    layers[end + 1] = {"norm.scale": state["model.norm.weight"]}
    layers[end + 2] = {"final_linear.weight": share(state["lm_head.weight"], rank, ranks)}
    return layers


NEOX_KEYS: dict[str, Any] = {
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "seq-length": 64,
    "max-position-embeddings": 64,
    "pos-emb": "rotary",
    "rotary-pct": 0.25,
    "norm": "layernorm",
    "no-weight-tying": True,
    "gpt-j-residual": True,
    "intermediate-size": 56,
    "tokenizer_type": "ByteTokenizer",
    "scaled-upper-triang-masked-softmax-fusion": True,
    "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "train-iters": 320000,
    "save": "checkpoints",
    "load": "checkpoints",
    "hostfile": "/mock_path",
    "launcher": "slurm",
    "pipe-parallel-size": 1,
}
"""A run's YAML as its users write it."""


def write_neox(
    folder: Path, ranks_layers: list[Layers], keys: dict[str, Any], step: int = 7, pipeline: bool = True
) -> Path:
    """Write ``folder/global_step{step}``, with configs/ and ``latest``; the checkpoint's folder."""
    checkpoint = folder / f"global_step{step}"
    (checkpoint / "configs").mkdir(parents=True)
    keys = {"model-parallel-size": len(ranks_layers), **keys}
    (checkpoint / "configs" / "run.yml").write_text(yaml.safe_dump(keys, sort_keys=False))
    (folder / "latest").write_text(checkpoint.name)
    for rank, layers in enumerate(ranks_layers):
        module = None
        if pipeline:
            for number, layer in layers.items():
                state = OrderedDict(layer)
                state._metadata = OrderedDict(version=1)  # as Module.state_dict has it
                torch.save(state, checkpoint / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        else:
            module = OrderedDict(
                (f"sequential.{number}.{key}", tensor)
                for number, layer in layers.items()
                for key, tensor in layer.items()
            )
        content = {
            "module": module,
            "iteration": step,
            "args": {"num_layers": 2},
            "neox_args": Namespace(lr=0.1),
            "sparse_tensor_module_names": set(),
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "loss": np.float64(2.5),
            "torch_rng_state": torch.get_rng_state(),
        }
        torch.save(content, checkpoint / f"mp_rank_{rank:02d}_model_states.pt")
    return checkpoint
