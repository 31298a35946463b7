"""Parts of the model against formulas, properties and finite differences."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import by_name, random_tokens, scatter_weights, small_gpt

from megatron_lite.config.sections.model import GATED
from megatron_lite.config.sections.rope import RopeScaling
from megatron_lite.model import token_loss
from megatron_lite.model.activations import ACTIVATIONS
from megatron_lite.model.block import Block
from megatron_lite.model.frequencies import Rope
from megatron_lite.model.norms import NORMS
from megatron_lite.model.rotary import rotary_table, rotate
from megatron_lite.parallel.parameter import ParameterFactory


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "softsign": lambda x: x / (1 + abs(x)),
}
GATED_FORMULAS = {
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: max(gate, 0.0) * up,
    "glu": lambda gate, up: sigmoid(gate) * up,
    "bilinear": lambda gate, up: gate * up,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    x = torch.linspace(-3, 3, 14)
    if name in GATED:
        pairs = zip(x[:7].tolist(), x[7:].tolist(), strict=True)
        expected = [GATED_FORMULAS[name](gate, up) for gate, up in pairs]
    else:
        expected = [FORMULAS[name](value) for value in x.tolist()]
    torch.testing.assert_close(ACTIVATIONS[name](x), torch.tensor(expected))


def test_norms() -> None:
    x, generator = torch.randn(3, 5, 16) * 4 + 2, torch.Generator().manual_seed(3)
    weight, bias = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    layer_norm = NORMS["layernorm"](16, 0.1, True, ParameterFactory(1))
    rms_norm = NORMS["rmsnorm"](16, 0.1, True, ParameterFactory(1))
    with torch.no_grad():
        layer_norm.weight.copy_(weight)
        rms_norm.weight.copy_(weight)
        layer_norm.bias.copy_(bias)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x), expected)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(rms_norm(x), expected)
    assert not hasattr(rms_norm, "bias")
    plain = NORMS["non_parametric_layernorm"](16, 0.1, True, ParameterFactory(1))
    torch.testing.assert_close(plain(x), centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt())
    assert not list(plain.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalenorm(dtype: torch.dtype) -> None:
    """GPT-NeoX's: x / max(length, epsilon) times one number; the length of a zero vector hurts nobody."""
    norm = NORMS["scalenorm"](16, 0.5, True, ParameterFactory(1))
    with torch.no_grad():
        norm.weight.fill_(3.0)
    x = torch.randn(4, 16) * torch.tensor([4.0, 1.0, 0.01, 0.0])[:, None]
    expected = 3.0 * x / x.norm(dim=-1, keepdim=True).clamp(min=0.5)
    found = norm(x.to(dtype).requires_grad_())
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    found.sum().backward()
    assert norm.weight.shape == (1,)
    assert torch.isfinite(norm.weight.grad).all()


def test_sinusoidal_positions() -> None:
    """sin(position / 10000^(2i/hidden)), then the cosines; without parameters."""
    gpt = small_gpt(pos_emb="sinusoidal")
    frequency = 10000.0 ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    angle = torch.outer(torch.arange(12, dtype=torch.float64), frequency)
    tokens, embedding = random_tokens(2, 12), gpt.layers[0]
    expected = embedding.weight[tokens] + torch.cat([angle.sin(), angle.cos()], -1).float()
    torch.testing.assert_close(embedding(tokens), expected, rtol=0, atol=1e-5)
    assert not any("embed_pos" in name for name in by_name(gpt))


def rotation(size: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rope = Rope(size, 100.0, RopeScaling(), length, length)
    cos, sin = rotary_table(rope, length, torch.device("cpu"), dtype)
    return cos[:, None, None], sin[:, None, None]


@pytest.mark.parametrize("size", [4, 8])
def test_rotation_turns_pairs_of_channels(size: int) -> None:
    """Channels i and i + size/2, as a complex number, times exp(i · position · base^(-2i/size))."""
    x = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    turned = rotate(x, rotation(size, 5, torch.float64)).permute(0, 3, 1, 2, 4)
    half = size // 2
    frequency = 100.0 ** (-2 * torch.arange(half) / size)
    angle = torch.outer(torch.arange(5), frequency)[:, None, None].double()
    expected = torch.complex(x[..., :half], x[..., half:size]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned[..., :half], expected.real, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[..., half:size], expected.imag, rtol=0, atol=1e-5)
    assert torch.equal(turned[..., size:], x[..., size:])


@pytest.mark.parametrize("size", [4, 8])
def test_gradient_of_rotation(size: int) -> None:
    x = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    turn = rotation(size, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, turn), (x,))


def test_rotary_table_is_made_once() -> None:
    ropes = [Rope(8, 123.0, RopeScaling(rope_type="linear", factor=2.0), 16, 16) for _ in range(2)]
    tables = [rotary_table(rope, 16, torch.device("cpu"), torch.float32) for rope in ropes]
    assert tables[0][0] is tables[1][0]


@pytest.mark.parametrize("vocabulary", [11, 70_000])  # a slice of rows holds everything, or few rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_loss(dtype: torch.dtype, vocabulary: int) -> None:
    hidden, labels = torch.randn(3, 5, vocabulary, dtype=dtype) * 3, torch.randint(0, vocabulary, (3, 5))
    weights = torch.rand(3, 5)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = token_loss(ours * 1, labels)
    expected = F.cross_entropy(theirs.float().flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_token_loss_refuses_a_second_backward() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True) * 1
    loss = token_loss(logits, torch.zeros(2, 3, dtype=torch.int64)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parallel_residual_with_one_norm() -> None:
    """x + attention(n(x)) + mlp(n(x)), written with the block's own parts."""
    gpt = small_gpt(gpt_j_residual=True, gpt_j_tied=True, pos_emb="none").eval()
    scatter_weights(gpt)
    block, x = gpt.layers[1], torch.randn(2, 6, 64)
    assert isinstance(block, Block)
    normed = block.input_layernorm(x)
    expected = x + block.attention(normed, None, None) + block.mlp(normed)
    torch.testing.assert_close(block(x), expected)
    assert not any("post_attention" in name for name in by_name(gpt))


def test_qk_norm_makes_scores_independent_of_the_scale_of_queries() -> None:
    gpt = small_gpt(use_qk_layernorm=True, norm="rmsnorm", use_bias_in_attn_linear=False).eval()
    scatter_weights(gpt)
    names = by_name(gpt)
    assert names["layers.0.attention.q_norm.weight"].shape == (16,)
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        before = gpt(tokens)
        rows = names["layers.0.attention.query_key_value.weight"].view(4, 3, 16, 64)
        rows[:, 0] *= 7.0
        torch.testing.assert_close(gpt(tokens), before, rtol=0, atol=1e-4)
        rows[:, 2] *= 7.0
        assert (gpt(tokens) - before).abs().max() > 0.1


def test_the_future_is_not_seen() -> None:
    gpt = small_gpt(pos_emb="rotary", num_kv_heads=2).eval()
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 128
    before, after = gpt(tokens), gpt(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_for_training(key: str) -> None:
    tokens = random_tokens(2, 16)
    plain, dropping = small_gpt(), small_gpt(**{key: 0.5})
    assert torch.equal(dropping.eval()(tokens), plain.eval()(tokens))
    assert not torch.equal(dropping.train()(tokens), plain.train()(tokens))
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


def test_hidden_dropout_keeps_the_mean_of_embeddings() -> None:
    embedding = small_gpt(hidden_dropout=0.25, pos_emb="none").layers[0]
    tokens = torch.full((64, 512), 3)
    torch.manual_seed(0)
    dropped = embedding(tokens)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped.mean((0, 1)), embedding.weight[3], rtol=0.05, atol=1e-4)


BF16_MODELS: list[dict[str, Any]] = [
    {"pos_emb": "rotary", "rotary_pct": 0.25},
    {"pos_emb": "rotary", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2},
    {"pos_emb": "learned", "gpt_j_residual": True},
]


@pytest.mark.parametrize("keys", BF16_MODELS)
def test_bf16_follows_fp32(keys: dict[str, Any]) -> None:
    tokens = random_tokens(4, 32)
    whole, half = (
        small_gpt(init_method="small_init", **keys),
        small_gpt(torch.bfloat16, init_method="small_init", **keys),
    )
    expected, logits = whole(tokens), half(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).std() < 0.02 * expected.std()
    losses = [token_loss(each, tokens).mean() for each in (logits, expected)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-3)
    for loss in losses:
        loss.backward()
    for name, parameter in by_name(half).items():
        reference = by_name(whole)[name].grad
        assert parameter.grad is not None
        assert reference is not None
        assert (parameter.grad.float() - reference).norm() < 0.05 * reference.norm(), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_blocks_compute_the_same_in_one_graph() -> None:
    torch.compiler.reset()
    tokens = random_tokens(2, 17)
    keys = {"pos_emb": "rotary", "rotary_pct": 0.5, "num_kv_heads": 2, "checkpoint_activations": True}
    eager, compiled = small_gpt(**keys), small_gpt(**keys, torch_compile=True)
    for gpt in (eager, compiled):
        token_loss(gpt(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
    expected = by_name(eager)
    for name, parameter in by_name(compiled).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-6)
    block = compiled.layers[1]
    assert isinstance(block, Block)
    torch.compiler.reset()
    explained = torch._dynamo.explain(block.compute)(torch.randn(2, 16, 64), rotation(8, 16, torch.float32))
    assert explained.graph_count == 1
