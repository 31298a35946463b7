"""The yardstick of ``train_throughput.py``: the same GPT, trained by a bare PyTorch loop.

Plain torch modules, SDPA and fused AdamW, nothing of megatron_lite but its data reader (so that the batches
are the same) and the initial weights (so that the losses can be compared). Prints one JSON object.

    python benchmarks/bare_loop.py RESOLVED_CONFIG.yml --steps 30 [--autocast]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.config import Config, load_config
from megatron_lite.data.batches import micro_batch
from megatron_lite.data.datasets import open_datasets
from megatron_lite.model import build_gpt
from megatron_lite.parallel.parameter import ParameterFactory, spec_of


class Block(nn.Module):
    """A pre-norm GPT-NeoX block with sequential residual."""

    def __init__(self, width: int, heads: int, rotary_size: int) -> None:
        super().__init__()
        self.heads, self.rotary_size = heads, rotary_size
        self.input_layernorm = nn.LayerNorm(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"dense_h_to_4h": nn.Linear(width, 4 * width), "dense_4h_to_h": nn.Linear(4 * width, width)}
        )

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned, kept = x[..., : self.rotary_size], x[..., self.rotary_size :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, kept), dim=-1)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, width = x.shape
        qkv = self.attention["query_key_value"](self.input_layernorm(x))
        q, k, v = qkv.view(b, s, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention["dense"](y.transpose(1, 2).reshape(b, s, width))
        hidden = F.gelu(self.mlp["dense_h_to_4h"](self.post_attention_layernorm(x)))
        return x + self.mlp["dense_4h_to_h"](hidden)


class BareGPT(nn.Module):
    """Embedding, blocks, final norm, untied head; parameter names are megatron_lite's global names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = config.model
        self.rotary_size = int(shape.head_size * shape.rotary_pct)
        self.base = shape.rotary_emb_base
        self.embed_in = nn.Embedding(shape.padded_vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            Block(shape.hidden_size, shape.num_attention_heads, self.rotary_size)
            for _ in range(shape.num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(shape.hidden_size)
        self.embed_out = nn.Linear(shape.hidden_size, shape.padded_vocab_size, bias=False)
        angles = torch.arange(shape.seq_length)[:, None] / self.base ** (
            torch.arange(0, self.rotary_size, 2) / self.rotary_size
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_in(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.embed_out(self.final_layer_norm(x))


def build(config: Config) -> BareGPT:
    """The bare model with the weights that megatron_lite would start from."""
    with torch.device("meta"):
        model = BareGPT(config)
    ours = build_gpt(config, ParameterFactory(config.training.seed))
    weights = {spec_of(parameter).name: parameter.detach() for parameter in ours.parameters()}
    model.load_state_dict(weights, assign=True)
    rebuilt = BareGPT(config)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    arguments = parser.parse_args()
    config = load_config([arguments.config], world_size=1)
    train = open_datasets(config).train
    model = build(config)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decay, "weight_decay": config.optimizer.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
    )
    micro = config.batch.train_micro_batch_size_per_gpu
    accumulation = config.batch.gradient_accumulation_steps
    losses, seconds = [], []
    for step in range(arguments.steps):
        start = time.perf_counter()
        total = 0.0
        for index in range(accumulation):
            batch = micro_batch(train, (step * accumulation + index) * micro, micro, torch.device("cpu"))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.autocast):
                logits = model(batch.tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten()) / accumulation
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(total)
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
