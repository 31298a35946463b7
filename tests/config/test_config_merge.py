"""Several files, overrides, second names: what wins, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import Config, config_from_keys, load_config
from megatron_lite.utils.errors import ConfigError

MODEL = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 16\n"


def load(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Config:
    paths = []
    for number, text in enumerate(texts):
        paths.append(folder / f"{number}.yml")
        paths[-1].write_text(text)
    return load_config(paths, overrides)


def test_later_files_win_and_say_so(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL + "seed: 1\ntrain-iters: 5\n", "train_iters: 5\nseed: 2\n")
    assert config.training.seed == 2
    assert config.messages == (f"{tmp_path}/1.yml:2: seed = 2 overrides 1 ({tmp_path}/0.yml:5)",)


def test_overrides_win_over_files(tmp_path: Path) -> None:
    block = "optimizer:\n  type: Adam\n  params:\n    lr: 1e-4\n    betas: [0.9, 0.95]\n"
    overrides = ("hidden-size=64", "optimizer.params.lr=1e-3")
    config = load(tmp_path, MODEL + block, overrides=overrides)
    assert config.model.hidden_size == 64
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.9, 0.95))
    assert config.messages == (
        f"--set: hidden_size = 64 overrides 32 ({tmp_path}/0.yml:2)",
        f"--set: optimizer.params.lr = 0.001 overrides 0.0001 ({tmp_path}/0.yml:8)",
    )


def test_a_block_is_replaced_whole_and_a_dotted_key_changes_it(tmp_path: Path) -> None:
    zero = "zero_optimization:\n  stage: 1\n  overlap_comm: true\n"
    replaced = load(tmp_path, MODEL + zero, "zero_optimization: {stage: 2}\n")
    assert replaced.zero.block == {"stage": 2}
    changed = load(tmp_path, MODEL + zero, "zero_optimization.stage: 2\n")
    assert changed.zero.block == {"stage": 2, "overlap_comm": True}


def test_a_dotted_key_makes_the_block(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL, overrides=("fp16.enabled=true", "fp16.initial_scale_power=8"))
    assert config.precision.precision == "fp16"
    assert config.precision.fp16.initial_scale_power == 8


def test_null_takes_a_key_back_to_its_default(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL + "seed: 7\nfp16: {enabled: true}\n", "seed: null\nfp16:\n")
    assert (config.training.seed, config.precision.precision) == (1234, "fp32")


def test_second_names(tmp_path: Path) -> None:
    text = MODEL + "gas: 3\nlr: 0.5\nzero_stage: 2\nsave-interval: 10\nclip_grad: 0.7\n"
    config = load(tmp_path, text)
    assert config.batch.gradient_accumulation_steps == 3
    assert (config.optimizer.lr, config.optimizer.gradient_clipping) == (0.5, 0.7)
    assert (config.zero.stage, config.checkpoint.checkpoint_factor) == (2, 10)
    assert config.messages == ()


def test_second_names_may_agree_but_not_differ(tmp_path: Path) -> None:
    agree = "lr: 1e-2\noptimizer: {params: {lr: 0.01}}\n"
    assert load(tmp_path, MODEL + agree).optimizer.lr == 0.01
    with pytest.raises(ConfigError, match=r"0.yml:5: optimizer.params.lr is given as 0.02 and as 0.01"):
        load(tmp_path, MODEL + "lr: 2e-2\noptimizer: {params: {lr: 0.01}}\n")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is given as"):
        load(tmp_path, MODEL + "gas: 3\ngradient_accumulation_steps: 2\n")


def test_a_dotted_key_into_something_that_is_no_block(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: params is 3"):
        load(tmp_path, MODEL + "optimizer: {params: 3}\n", overrides=("optimizer.params.lr=1",))


def test_the_run_is_named_after_the_first_file(tmp_path: Path) -> None:
    assert load(tmp_path, MODEL, "seed: 1").run_dir == Path("runs/0")
    config = load(tmp_path, MODEL + "run_dir: elsewhere\n")
    assert (config.run_dir, config.checkpoint.save) == (Path("elsewhere"), "elsewhere/checkpoints")
    assert config.messages == ()


def test_keys_of_code_may_be_dashed_and_dotted() -> None:
    keys = {
        "num-layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq-length": 16,
        "fp16.enabled": True,
    }
    assert config_from_keys(keys).precision.precision == "fp16"
