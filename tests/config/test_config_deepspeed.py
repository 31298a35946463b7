"""The dictionary for DeepSpeed, held against the installed DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megatron_lite.config import config_from_keys, load_config
from megatron_lite.config.deepspeed import deepspeed_config
from megatron_lite.config.neox import REFUSED
from megatron_lite.config.older_keys import OFFLOADS
from megatron_lite.config.schema import SECTION_OF
from megatron_lite.config.sections.deepspeed import EXTRA
from megatron_lite.config.sections.precision import Bf16Block, Fp16Block
from megatron_lite.config.sections.zero import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, PASSED, REMOVED, ZeroBlock
from megatron_lite.utils.errors import ConfigError

KEYS = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_zero_s_keys_are_deepspeed_s() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    theirs = set(fields) | {field.alias for field in fields.values() if field.alias}
    older = set(OFFLOADS) - {"cpu_offload_params"}  # that is older than theirs
    assert {*PASSED, *ZeroBlock.model_fields} | older == theirs - {"compute_grad_norm"}
    with pytest.raises(ConfigError, match="compute_grad_norm: by the norm"):
        config_from_keys({**KEYS, "zero_optimization": {"stage": 1, "compute_grad_norm": False}})


def test_the_types_within_zero_s_blocks_are_deepspeed_s() -> None:
    from deepspeed.runtime.zero import offload_config as offload
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {
        name: field.annotation
        for key, field in DeepSpeedZeroConfig.model_fields.items()
        for name in (key, field.alias)
    }
    for key, kind in PASSED.items():
        assert kind is dict or fields[key] in (kind, kind | None)
    for ours, theirs in (
        (OFFLOAD_PARAM, offload.DeepSpeedZeroOffloadParamConfig),
        (OFFLOAD_OPTIMIZER, offload.DeepSpeedZeroOffloadOptimizerConfig),
    ):
        assert set(ours) == set(theirs.model_fields)
        for key, kind in ours.items():
            assert kind is str or theirs.model_fields[key].annotation is kind


def test_keys_within_blocks_are_deepspeed_s() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    theirs = {
        "comms_logger": CommsLoggerConfig.model_fields,
        "csv_monitor": CSVConfig.model_fields,
        "tensorboard": TensorBoardConfig.model_fields,
        "wandb": WandbConfig.model_fields,
        "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
        "aio": AIO_DEFAULT_DICT,
        "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    }
    for block, names in theirs.items():
        config_from_keys({**KEYS, block: dict.fromkeys(names, False)})
        with pytest.raises(ConfigError, match=f"{block}: there is no key {min(names)}x; did you mean"):
            config_from_keys({**KEYS, block: {f"{min(names)}x": False}})


def test_what_is_wrong_within_a_block_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(
        "zero_optimization:\n  stage: 1\n  offload_optimizer:\n    device: cpu\n    pin_memroy: true\n"
    )
    with pytest.raises(
        ConfigError, match=r"run\.yml:5: zero_optimization\.offload_optimizer: there is no key"
    ):
        load_config([path])
    path.write_text("zero_optimization: {stage: 1}\n")
    with pytest.raises(ConfigError, match=r"^--set: zero_optimization: reduce_bucket_size should be a whole"):
        load_config([path], ["zero_optimization.reduce_bucket_size=many"])


class Asked(dict[str, Any]):
    """A dictionary that remembers which keys it was asked for."""

    keys_asked: ClassVar[set[object]] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def test_extra_keys_are_deepspeed_s() -> None:
    """What DeepSpeed looks for is a key of ours, refused, or allowed among the extra ones."""
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Asked(train_batch_size=1))
    older = {"bfloat16"}  # bf16's name of before
    assert Asked.keys_asked - set(SECTION_OF) - set(REFUSED) - older == EXTRA


def test_precision_keys_are_deepspeed_s() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    assert set(Bf16Block.model_fields) <= set(DeepSpeedBF16Config.model_fields)
    assert set(Fp16Block.model_fields) - {"fp16", "type"} <= set(DeepSpeedFP16Config.model_fields)
    theirs = DeepSpeedFP16Config()
    for key in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"):
        assert getattr(Fp16Block(), key) == getattr(theirs, key)


def test_what_deepspeed_has_removed_is_refused() -> None:
    from deepspeed.runtime import config as theirs

    assert set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    assert set(theirs._REMOVED_ZERO_CONFIG_KEYS) == REMOVED
    for key in REMOVED:
        with pytest.raises(ConfigError, match=f"DeepSpeed has removed {key}"):
            config_from_keys({**KEYS, "zero_optimization": {key: 2}})


@pytest.mark.parametrize("overlays", [[], ["bf16"], ["fp32"], ["zero2"], ["zero3", "bf16"], ["offload"]])
def test_deepspeed_reads_the_dictionary(overlays: list[str]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    files = [CONFIGS / f"{name}.yml" for name in ("2-7B", *overlays)]
    config = load_config(files, ["train_batch_size=8"])
    ours = deepspeed_config(config)
    theirs = DeepSpeedConfig(json.loads(json.dumps(ours)))
    assert theirs.train_batch_size == 8
    assert theirs.train_micro_batch_size_per_gpu == 4
    assert theirs.gradient_accumulation_steps == 2
    assert theirs.gradient_clipping == 1.0
    assert theirs.float16_config.enabled == (config.precision.precision == "fp16")
    assert theirs.bfloat16_config.enabled == (config.precision.precision == "bf16")
    assert theirs.zero_config.stage == config.zero.stage
    assert theirs.zero_config.reduce_bucket_size == 500_000_000
    assert (theirs.zero_config.offload_param is not None) == config.zero.offload_param


@pytest.mark.parametrize(
    ("keys", "entries"),
    [
        ({"flops_profiler": {"enabled": True}}, {"flops_profiler": {"enabled": True}}),
        ({"comms_logger": {"enabled": True}}, {"comms_logger": {"enabled": True}}),
        ({"wall_clock_breakdown": True}, {"wall_clock_breakdown": True}),
        ({"prescale_gradients": True}, {"prescale_gradients": True}),
        ({"communication_data_type": "fp32"}, {"communication_data_type": "fp32"}),
        ({"deepspeed_extra_args": {"comms_logger": {"enabled": True}}}, {"comms_logger": {"enabled": True}}),
        (
            {"zero_optimization": {"stage": 2, "overlap_comm": True}},
            {"zero_optimization": {"stage": 2, "overlap_comm": True}},
        ),
    ],
)
def test_blocks_are_passed_through(keys: dict[str, Any], entries: dict[str, Any]) -> None:
    result = deepspeed_config(config_from_keys({**KEYS, **keys}))
    assert result.items() >= entries.items()
    assert "optimizer" not in result
