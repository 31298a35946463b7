"""Older names in GPT-NeoX's files: what they ask for, as the program and DeepSpeed then see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config import config_from_keys, load_config
from megatron_lite.config.deepspeed import deepspeed_config
from megatron_lite.planner import estimate_memory
from megatron_lite.utils.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
CPU = {"device": "cpu"}


def write(path: Path, zero: str) -> Path:
    keys = "".join(f"{key}: {value}\n" for key, value in MODEL.items())
    path.write_text(f"{keys}zero_optimization: {zero}\n")
    return path


def test_cpu_offload_false_goes_with_offload_by_another_file(tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    old = write(tmp_path / "old.yml", "{stage: 1, cpu_offload: False, cpu_offload_param: False}")
    assert load_config([old]) == load_config(
        [write(tmp_path / "new.yml", "{stage: 1}")], ["run_dir=runs/old"]
    )
    config = load_config([old, CONFIGS / "offload.yml"])
    assert (config.zero.offload_optimizer, config.zero.offload_param) == (True, True)
    theirs = DeepSpeedConfig(json.loads(json.dumps(deepspeed_config(config)))).zero_config
    assert theirs.offload_optimizer.device == theirs.offload_param.device == "cpu"


@pytest.mark.parametrize("name", ["cpu_offload_param", "cpu_offload_params"])
def test_cpu_offload_is_known_to_the_planner(name: str) -> None:
    zero = {"stage": 3, "cpu_offload": True, name: True}
    config = config_from_keys({**MODEL, "vocab_size": 50257, "zero_optimization": zero})
    assert config == config_from_keys(
        {**config.flat(), "zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}}
    )
    assert {"optimizer", "parameters"} <= set(estimate_memory(config, on_gpu=True).host)
    assert config.with_keys(train_iters=3).zero == config.zero


def test_cpu_offload_is_refused_where_offload_is() -> None:
    with pytest.raises(ConfigError, match="offload_optimizer needs stage 1"):
        config_from_keys({**MODEL, "zero_optimization": {"stage": 0, "cpu_offload": True}})


def test_cpu_offload_that_disagrees_or_is_no_flag(tmp_path: Path) -> None:
    both = write(tmp_path / "both.yml", "{stage: 2, cpu_offload: true, offload_optimizer: {device: none}}")
    with pytest.raises(ConfigError, match=r"both.yml:5: zero_optimization.cpu_offload means .*keep one"):
        load_config([both])
    with pytest.raises(ConfigError, match=r"cpu_offload should be true or false, got 'yes'"):
        load_config([both], ["zero_optimization.cpu_offload='yes'"])


@pytest.mark.parametrize(
    ("given", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"activation": "gelu"}, "gelu_tanh"),
        ({"activation": None}, "gelu_tanh"),
        ({"activation": "gelu_tanh"}, "gelu_tanh"),
        ({"activation": "swiglu"}, "swiglu"),
    ],
)
def test_fused_gelu_is_the_tanh_approximation(given: dict[str, Any], activation: str) -> None:
    config = config_from_keys({**MODEL, **given, "bias-gelu-fusion": True})
    assert config.model.activation == activation
    assert config_from_keys(config.flat()) == config == config.with_keys()
    unfused = config_from_keys({**MODEL, **given, "bias_gelu_fusion": False})
    assert unfused == config_from_keys({**MODEL, **given})
    if given.get("activation") in (None, "gelu"):
        assert unfused.model.activation == "gelu"


def test_the_last_file_decides_on_fused_gelu(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yml", "{stage: 0}")
    path.write_text(path.read_text() + "bias_gelu_fusion: true\n")
    assert load_config([path], ["bias_gelu_fusion=false"]).model.activation == "gelu"
    config = load_config([path])
    assert config.model.activation == "gelu_tanh"
    assert config.messages == (
        f"{path}:6: bias_gelu_fusion makes the activation gelu_tanh, as GPT-NeoX's kernel has it",
    )
    (message,) = load_config([path], ["activation=relu"]).messages
    assert message == f"{path}:6: bias_gelu_fusion has no effect: the activation is relu"


def test_max_grad_norm_is_gradient_clipping(tmp_path: Path) -> None:
    optimizer = {"type": "Adam", "params": {"lr": 1e-4, "max_grad_norm": 0.5}}
    config = config_from_keys({**MODEL, "optimizer": optimizer})
    assert config.optimizer.gradient_clipping == 0.5
    assert config.optimizer.params == {}  # the optimizer would refuse it
    assert config.optimizer.lr == 1e-4
    assert config_from_keys({**MODEL, "optimizer": optimizer, "clip_grad": 0.5}) == config
    path = write(tmp_path / "run.yml", "{stage: 0}")
    path.write_text(
        path.read_text() + "gradient_clipping: 1.0\noptimizer:\n  params:\n    max_grad_norm: 0.5\n"
    )
    with pytest.raises(
        ConfigError, match=r"run.yml:9: optimizer.params.max_grad_norm is 0.5, but .*keep one"
    ):
        load_config([path])


def test_aio_s_threads_by_their_older_name() -> None:
    """As in Hugging Face's and DeepSpeed's older examples; DeepSpeed itself would pass over it in silence."""
    aio = {"block_size": 262144, "thread_count": 4}
    given = deepspeed_config(config_from_keys({**MODEL, "aio": aio}))
    assert given["aio"] == {"block_size": 262144, "intra_op_parallelism": 4}
    with pytest.raises(
        ConfigError, match=r"aio.thread_count is 4, but .*intra_op_parallelism is 2: keep one"
    ):
        config_from_keys({**MODEL, "aio": aio | {"intra_op_parallelism": 2}})
