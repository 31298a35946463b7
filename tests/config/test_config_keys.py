"""Each key: known, of the right type, in effect, retired or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lite.config import config_from_keys, load_config
from megatron_lite.config.neox import ALIASES, REFUSED, RETIRED
from megatron_lite.config.older_keys import REWRITTEN
from megatron_lite.config.schema import SECTION_OF
from megatron_lite.utils.errors import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
NEOX_FILE = Path(__file__).with_name("gpt_neox_keys.yml")
NEOX_KEYS: dict[str, Any] = yaml.safe_load(NEOX_FILE.read_text())


def refusal(tmp_path: Path, line: str) -> str:
    """The error that ``line``, the fifth of a file, leads to."""
    path = tmp_path / "run.yml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in MODEL.items()) + line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    message = str(caught.value)
    assert message.startswith(f"{path}:5: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}:5: ")


def test_every_gpt_neox_key_is_known_in_one_way() -> None:
    tables = (SECTION_OF, ALIASES, RETIRED, REFUSED, REWRITTEN)
    known = {key: sum(key in table for table in tables) for key in NEOX_KEYS}
    assert {key: count for key, count in known.items() if count != 1} == {}


def test_gpt_neox_defaults_are_accepted_without_a_word(tmp_path: Path) -> None:
    shape = tmp_path / "shape.yml"
    shape.write_text(yaml.safe_dump(MODEL))
    config = load_config([NEOX_FILE, shape])  # in this order: a null takes a key back to its default
    said = [message for message in config.messages if "has no effect" in message]
    assert said == []


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("pos_emb", "learned"),
        ("norm", "layernorm"),
        ("layernorm_epsilon", 1e-5),
        ("rms_norm_epsilon", 1e-8),
        ("init_method", "normal"),
        ("output_layer_init_method", "scaled_normal"),
        ("warmup", 0.01),
        ("lr_decay_style", "linear"),
        ("weight_decay", 0.1),
        ("gradient_clipping", 1.0),
        ("seed", 1234),
    ],
)
def test_defaults_are_gpt_neox_s(key: str, ours: Any) -> None:
    assert config_from_keys(MODEL).flat()[key] == NEOX_KEYS[key] == ours


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("hiden_size: 3", "hidden_size"),
        ("train-itters: 3", "train_iters"),
        ("num_atention_heads: 3", "num_attention_heads"),
        ("fp16: {enabeld: true}", "enabled"),
        ("optimizer: {params: {lr: 1.0}, tpye: Adam}", "type"),
        ("zero_optimization: {stag: 1}", "stage"),
        ("zero_optimization: {reduce_bucket: 1}", "reduce_bucket_size"),
        ("zero_optimisation.stage: 1", "zero_optimization"),
    ],
)
def test_an_unknown_key_is_told_the_nearest(tmp_path: Path, wrong: str, right: str) -> None:
    message = refusal(tmp_path, wrong)
    assert "there is no key" in message
    assert message.endswith(f"did you mean {right}?")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("train_iters: many", "train_iters"),
        ("train_iters: 1.5", "train_iters"),
        ("train_iters: true", "train_iters"),
        ("train_iters: '100'", "train_iters"),
        ("train_iters: -1", "train_iters"),
        ("num_kv_heads: 0", "num_kv_heads"),
        ("hidden_dropout: 1.5", "hidden_dropout"),
        ("min_lr: .nan", "min_lr"),
        ("min_lr: .inf", "min_lr"),
        ("init_method_std: 1e999", "init_method_std"),
        ("weight_decay: -0.1", "weight_decay"),
        ("gpt_j_residual: 1", "gpt_j_residual"),
        ("data_path: 3", "data_path"),
        ("norm: batchnorm", "norm"),
        ("pos_emb: alibi", "pos_emb"),
        ("train_data_paths: one", "train_data_paths"),
        ("fp16: true", "fp16"),
        ("fp16: {loss_scale: high}", "fp16.loss_scale"),
        ("optimizer: {params: {lr: .nan}}", "optimizer.params.lr"),
        ("optimizer: {params: {betas: [0.9]}}", "optimizer.params.betas.1"),
        ("optimizer: {type: OneBitAdam}", "optimizer.type"),
        ("zero_optimization: {stage: 4}", "zero_optimization.stage"),
        ("rampup_batch_size: [1, 2]", "rampup_batch_size.2"),
        ("lr_decay_style: exponential", "lr_decay_style"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_its_place(tmp_path: Path, line: str, key: str) -> None:
    assert refusal(tmp_path, line).startswith(f"{key} ")


def test_a_choice_names_what_there_is(tmp_path: Path) -> None:
    message = refusal(tmp_path, "attention_backend: fast")
    assert message == "attention_backend should be 'auto', 'sdpa' or 'flash_attn', got 'fast'"


@pytest.mark.parametrize(
    "line",
    [
        "moe_token_dropping: true",
        "moe_glu: true",
        "moe_jitter_eps: 0.01",
        "moe_router_type: sinkhorn",
        "train_impl: dpo",
        "use_mup: true",
        "use_comet: true",
        "te_mha: true",
        "train_reward_data_paths: [rewards]",
        "soft_prompt_tuning: {enabled: true}",
        "scheduler: {type: WarmupLR}",
        "amp: {enabled: true}",
        "elasticity: {enabled: true, max_train_batch_size: 2000}",
        "train_epochs: 2",
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, line: str) -> None:
    assert "cannot be" in refusal(tmp_path, line)


def test_refused_keys_pass_when_they_ask_for_nothing() -> None:
    plain = config_from_keys(MODEL)
    for key in REFUSED:
        values: list[Any] = [NEOX_KEYS.get(key), None, {}, [], {"enabled": False}]
        for nothing in values:
            assert config_from_keys({**MODEL, key: nothing}) == plain


def test_a_retired_key_says_why(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in MODEL.items()) + "rope_fusion: True\n")
    (message,) = load_config([path]).messages
    assert message == f"{path}:5: rope_fusion has no effect: {RETIRED['rope_fusion'].why}"


def test_a_kind_of_attention_that_is_not_there_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(MODEL) + "attention-config: [[[mamba], 2]]\n")
    with pytest.raises(ConfigError, match=rf"names 'mamba'; .* \(attention_config in {path}:5\)"):
        load_config([path])


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="does not say num_layers, num_attention_heads: add a model file"):
        config_from_keys({"hidden_size": 8, "seq_length": 8})
