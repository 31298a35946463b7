"""What follows from the keys, and which keys contradict each other."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config import Config, config_from_keys, load_config
from megatron_lite.config.deepspeed import deepspeed_config
from megatron_lite.config.derive import BATCH
from megatron_lite.utils.errors import ConfigError

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 16}
SMALL = st.integers(min_value=1, max_value=64)


def make(**keys: Any) -> Config:
    return config_from_keys({**SHAPE, **keys})


def batch_of(config: Config) -> tuple[int, int, int]:
    batch = config.batch
    return batch.train_batch_size, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps


@given(SMALL, SMALL, SMALL)
def test_any_two_of_the_batch_triple_give_the_third(micro: int, steps: int, ranks: int) -> None:
    triple = (micro * steps * ranks, micro, steps)
    for size in (2, 3):
        for chosen in combinations(range(3), size):
            keys = {BATCH[index]: triple[index] for index in chosen}
            assert batch_of(make(**keys, world_size=ranks)) == triple


@given(SMALL, SMALL)
def test_one_of_the_batch_triple_is_enough(number: int, ranks: int) -> None:
    assert batch_of(make(world_size=ranks)) == (ranks, 1, 1)
    assert batch_of(make(train_batch_size=number * ranks, world_size=ranks)) == (number * ranks, number, 1)
    micro = make(train_micro_batch_size_per_gpu=number, world_size=ranks)
    assert batch_of(micro) == (number * ranks, number, 1)
    steps = make(gradient_accumulation_steps=number, world_size=ranks)
    assert batch_of(steps) == (number * ranks, 1, number)


@given(st.lists(SMALL, min_size=3, max_size=3), SMALL)
def test_batch_contradictions_are_explained_with_the_numbers(sizes: list[int], ranks: int) -> None:
    total, micro, steps = sizes
    if total != micro * steps * ranks:
        with pytest.raises(ConfigError) as caught:
            make(**dict(zip(BATCH, sizes, strict=True)), world_size=ranks)
        for number in (*sizes, ranks, micro * steps * ranks):
            assert f" {number}" in str(caught.value)
    if total % (micro * ranks):
        with pytest.raises(
            ConfigError, match=f"{total} is not a multiple of .* {micro} x {ranks} data-parallel"
        ):
            make(train_batch_size=total, train_micro_batch_size_per_gpu=micro, world_size=ranks)


def test_a_contradiction_names_the_places(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("hidden_size: 50\nnum_attention_heads: 4\nnum_layers: 1\nseq_length: 8\n")
    with pytest.raises(ConfigError, match="hidden_size 50 does not divide into 4 heads") as caught:
        load_config([path])
    assert str(caught.value).endswith(f"(hidden_size in {path}:1, num_attention_heads in {path}:2)")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_kv_heads": 3}, "3 key/value heads"),
        ({"max_position_embeddings": 8}, "8 is less than seq_length 16"),
        ({"pos_emb": "rotary", "rotary_pct": 0.25}, "3 rotating dimensions"),
        ({"pos_emb": "rotary", "rotary_pct": 0.01}, "0 rotating dimensions"),
        ({"pos_emb": "rotary", "kv_channels": 7}, "heads of width 7 makes 7 rotating dimensions"),
        ({"pos_emb": "sinusoidal", "hidden_size": 9, "num_attention_heads": 3}, "hidden_size 9 is odd"),
        ({"pos_emb": "rotary", "opt_pos_emb_offset": 2}, "but pos_emb is rotary: leave it out"),
        ({"model_parallel_size": 2, "world_size": 3}, "3 ranks do not divide into replicas"),
        ({"pipe_parallel_size": 2, "world_size": 3}, "multiple of 2 ranks"),
        ({"model_parallel_size": 5}, "5 does not divide the number of attention heads"),
        ({"model_parallel_size": 2, "intermediate_size": 5}, "the inner width of the MLP 5"),
        (
            {"model_parallel_size": 2, "vocab_size": 7, "make_vocab_size_divisible_by": 1},
            "the padded vocabulary of 7: choose another model_parallel_size or make_vocab_size_divisible_by",
        ),
        ({"model_parallel_size": 2, "sequence_parallel": True, "seq_length": 15}, "into 2 slices"),
        (
            {"model_parallel_size": 8, "context_parallel_size": 2, "context_parallel_kind": "ulysses"},
            "model_parallel_size 8 does not divide the number of attention heads",
        ),
        ({"model_parallel_size": 2, "optimizer.type": "Muon"}, "needs whole matrices"),
        ({"min_lr": 1.0}, "min_lr 1.0 is above the learning rate 0.001"),
        ({"weight_decay": 0.1, "optimizer.params.weight_decay": 0.2}, "keep one"),
        ({"warmup_iters": 1, "warmup_tokens": 1}, "keep one"),
        ({"warmup_iters": 11, "train_iters": 10}, "longer than lr_decay_iters 10"),
        ({"data_path": "a", "train_data_paths": ["b"]}, "both name the training data"),
        ({"train_data_paths": ["a", "b"], "train_data_weights": [1]}, "1 numbers for 2"),
        ({"rampup_batch_size": [3, 2, 10], "train_batch_size": 8}, "does not meet train_batch_size 8"),
        (
            {"rampup_batch_size": [2, 3, 10], "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2},
            "multiples of",
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
        ({"deepspeed_extra_args": {"train_batch_size": 3}}, "a key of its own"),
        ({"deepspeed_extra_args": {"elasticity": {"enabled": True}}}, "removed"),
        ({"deepspeed_extra_args": {"memory_brakedown": True}}, "did you mean memory_breakdown"),
        ({"deepspeed_extra_args": {"bfloat16": {"enabled": True}}}, "did you mean bf16"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "reduce_bucket_size should be a whole number",
        ),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "reduce_bucket_size should be a whole number"),
        ({"zero_optimization": {"sub_group_size": -1}}, "sub_group_size should be a whole number"),
        ({"zero_optimization": {"reduce_scatter": 1}}, "reduce_scatter should be true or false"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memroy": True}}},
            "zero_optimization.offload_optimizer: there is no key pin_memroy; did you mean pin_memory",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": True}}},
            "buffer_count should be a whole number",
        ),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**keys)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "fp32"),
        ({"fp16": {"fp16": True, "enabled": True}}, "fp16"),
        ({"fp16": {"fp16": True, "enabled": True, "type": "bfloat16"}}, "bf16"),
        ({"fp16": {"enabled": False, "type": "bfloat16"}}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"precision": "bfloat16"}, "bf16"),
        ({"precision": "bfloat16", "bf16": {"enabled": True}}, "bf16"),
        ({"precision": "bfloat16", "fp16": {"enabled": True, "type": "bfloat16"}}, "bf16"),
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "fp32", "fp16": {"enabled": False}}, "fp32"),
    ],
)
def test_precision(keys: dict[str, Any], precision: str) -> None:
    assert make(**keys).precision.precision == precision


@pytest.mark.parametrize(
    "keys",
    [
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {"precision": "fp32", "fp16": {"enabled": True}},
        {"precision": "fp16", "bf16": {"enabled": True}},
    ],
)
def test_two_precisions_are_one_too_many(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="keep one"):
        make(**keys)


@pytest.mark.parametrize(
    "pattern",
    [
        None,
        [[["global"], "all"]],
        [[["global", "flash"], "all"]],
        [[["global"], 1], [["flash"], 3]],
        ["flash"] * 4,
    ],
)
def test_attention_kinds(pattern: Any) -> None:
    assert make(attention_config=pattern).model.attention_kinds == ("global",) * 4


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ([[["global"], 3]], "describes 3 layers, but num_layers is 4"),
        ([[["global"], 5]], "describes 5 layers"),
        ([[["global"] * 3, "all"]], "does not divide num_layers 4"),
        (
            [[["global", "bigbird"], "all"]],
            "names 'bigbird'; the kinds of attention are global, flash, local",
        ),
        ([[["global", "local"], "all"]], "say with sliding_window_width how many tokens they see"),
        ([[["global"], 0]], "attention_config is a list of"),
        ([[["global"], "some"]], "attention_config is a list of"),
        ([[[], "all"]], "attention_config is a list of"),
        ([3], "attention_config is a list of"),
    ],
)
def test_attention_configs_that_make_no_model(pattern: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(attention_config=pattern)


@pytest.mark.parametrize(
    ("intermediate", "inner"),
    [(11008 * 3, 11008), (13824 * 3, 13824), (28672 * 3, 28672), (14336 * 3, 14336)],
    ids=["Llama-2 7B", "Llama-2 13B", "Llama-2 70B", "Mistral 7B"],
)
def test_gated_widths_of_known_models(intermediate: int, inner: int) -> None:
    model = make(activation="swiglu", intermediate_size=intermediate).model
    assert (model.is_gated, model.ffn_size) == (True, inner)


@given(st.integers(1, 10**5), st.integers(1, 512))
def test_mlp_widths_follow_gpt_neox_s_rule(intermediate: int, multiple: int) -> None:
    gated = make(activation="geglu", intermediate_size=intermediate, mlp_multiple_of=multiple).model.ffn_size
    both_halves = int(intermediate * 2 / 3)
    assert gated % multiple == 0
    assert both_halves <= 2 * gated < both_halves + 2 * multiple
    plain = make(activation="gelu", intermediate_size=intermediate, mlp_multiple_of=multiple).model.ffn_size
    assert plain % multiple == 0
    assert intermediate <= plain < intermediate + multiple


def test_widths_that_are_not_given() -> None:
    assert make().model.intermediate_size == 192
    assert make(expansion_factor=2.5).model.intermediate_size == 120
    assert make(expansion_factor=2.5, intermediate_size=7).model.intermediate_size == 7
    assert make(vocab_size=50257).model.padded_vocab_size == 50304
    assert make(vocab_size=128).model.padded_vocab_size == 128


def test_schedule_lengths() -> None:
    schedule = make(train_iters=1000, warmup=0.05, lr_decay_fraction=0.8).schedule
    assert (schedule.decay_steps, schedule.warmup_steps, schedule.wsd_decay_iters) == (800, 40, 80)
    assert make(train_iters=1000, warmup_iters=7).schedule.warmup_steps == 7
    assert make(train_iters=1000, warmup_tokens=7).schedule.warmup_steps is None
    assert make(train_iters=1000, lr_decay_iters=500).schedule.decay_steps == 500


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("Adam", "adamw"),
        ("AdamW", "adamw"),
        ("cpu_torch_adam", "adamw"),
        ("CPUAdam", "cpu_adam"),
        ("SGD", "sgd"),
    ],
)
def test_optimizer_names(name: str, canonical: str) -> None:
    assert make(optimizer={"type": name}).optimizer.type == canonical


def test_weight_decay_may_stand_in_the_optimizer() -> None:
    optimizer = make(**{"optimizer.params.weight_decay": 0.01, "optimizer.params.amsgrad": True}).optimizer
    assert (optimizer.weight_decay, optimizer.params["amsgrad"]) == (0.01, True)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert make().data.data_cache_dir == "/somewhere/megatron_lite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert make().data.data_cache_dir == "/home/me/.cache/megatron_lite"


def test_the_cache_is_never_the_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert Path(make().data.data_cache_dir).is_absolute()


def test_adafactor_is_refused_where_it_diverges() -> None:
    assert make(optimizer={"type": "Adafactor"}, zero_optimization={"stage": 2}).zero.stage == 2
    with pytest.raises(ConfigError, match="Adafactor diverges under ZeRO stage 3"):
        make(optimizer={"type": "Adafactor"}, zero_optimization={"stage": 3})


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, (None,) * 4),
        ({"sliding_window_width": 8}, (8,) * 4),
        ({"sliding_window_width": 8, "attention_config": [[["flash"], "all"]]}, (8,) * 4),
        (
            {"sliding_window_width": 8, "attention_config": [[["local", "global"], "all"]]},
            (8, None, 8, None),
        ),
    ],
)
def test_which_layers_have_a_window(keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert make(**keys).model.attention_windows == windows


def test_positions_are_reset_with_the_attention_mask_only() -> None:
    assert make(reset_attention_mask=True, reset_position_ids=True).data.reset_position_ids
    with pytest.raises(ConfigError, match="set reset_attention_mask too"):
        make(reset_position_ids=True)


@pytest.mark.parametrize(
    ("keys", "ring"),
    [
        ({"context_parallel_size": 2}, False),
        ({"context_parallel_size": 2, "context_parallel_kind": "ring"}, True),
        ({"context_parallel_size": 2, "model_parallel_size": 2}, False),
        ({"context_parallel_size": 2, "model_parallel_size": 4}, True),  # one head a rank
        ({"context_parallel_size": 8}, True),
    ],
)
def test_ulysses_where_heads_suffice(keys: dict[str, Any], ring: bool) -> None:
    ranks = keys["context_parallel_size"] * keys.get("model_parallel_size", 1)
    config = make(**keys, world_size=2 * ranks)
    assert config.context_by_ring is ring
    assert config.parallel.data_parallel_size == 2
    assert config.batch.train_batch_size == 2, "context ranks share samples"
    assert deepspeed_config(config)["train_batch_size"] == 2 * keys["context_parallel_size"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"context_parallel_size": 8, "context_parallel_kind": "ulysses"},
            "ulysses cannot divide 4 attention heads over context_parallel_size 8 ranks",
        ),
        ({"context_parallel_size": 2, "seq_length": 17}, "ulysses .* seq_length 17 into 2 equal parts"),
        (
            {"context_parallel_size": 2, "seq_length": 18, "context_parallel_kind": "ring"},
            "ring .* seq_length 18 into 4 equal parts: choose a multiple of 4",
        ),
        (
            {
                "context_parallel_size": 2,
                "model_parallel_size": 2,
                "sequence_parallel": True,
                "seq_length": 18,
            },
            "seq_length 18 into 4 equal parts",
        ),
    ],
)
def test_sequences_that_context_ranks_cannot_share(keys: dict[str, Any], sentence: str) -> None:
    ranks = keys["context_parallel_size"] * keys.get("model_parallel_size", 1)
    with pytest.raises(ConfigError, match=sentence):
        make(**keys, world_size=ranks)
