"""The Config itself: frozen, saved and read again, changed, cheap to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_lite.config import config_from_keys, load_config
from megatron_lite.config.summary import short_count, summary
from megatron_lite.utils.errors import ConfigError

KEYS = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "optimizer": st.fixed_dictionaries(
                {"type": st.sampled_from(["Adam", "Muon"])},
                optional={
                    "params": st.fixed_dictionaries({"lr": st.floats(1e-9, 1.0), "extra": st.booleans()})
                },
            ),
            "train_micro_batch_size_per_gpu": st.integers(1, 9),
            "fp16": st.fixed_dictionaries({"enabled": st.booleans()}),
            "train_data_paths": st.lists(st.text(min_size=1), min_size=1),
            "prompt_end": st.text(),
            "min_lr": st.floats(0, 1e-10),
            "rampup_batch_size": st.tuples(st.just(0), st.integers(1, 3), st.integers(1, 10**12)),
            "zero_optimization": st.fixed_dictionaries(
                {"stage": st.integers(0, 3), "reduce_bucket_size": st.integers(1)}
            ),
        },
    ),
    st.integers(1, 4),
)
def test_what_is_saved_reads_again_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, keys: dict, ranks: int
) -> None:
    if "rampup_batch_size" in keys:  # from and by some micro batches, up to four times as many
        unit = keys.setdefault("train_micro_batch_size_per_gpu", 1) * ranks
        _, factor, tokens = keys["rampup_batch_size"]
        keys |= {
            "rampup_batch_size": [unit * factor, unit * factor, tokens],
            "train_batch_size": 4 * factor * unit,
        }
    config = config_from_keys({**KEYS, **keys}, world_size=ranks)
    assert config_from_keys(config.flat()) == config
    assert config_from_keys(json.loads(json.dumps(config.flat()))) == config
    path = tmp_path_factory.getbasetemp() / "saved.yml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config([path])
    assert again == config
    assert again.messages == ()
    assert again.flat() == config.flat()


def test_sections_are_frozen() -> None:
    config = config_from_keys(KEYS)
    with pytest.raises(ValidationError, match="frozen"):
        config.model.hidden_size = 64  # type: ignore[misc]
    with pytest.raises(AttributeError):
        config.model = config.model  # type: ignore[misc]


def test_changed_keys_are_derived_anew_from_what_was_given() -> None:
    config = config_from_keys({**KEYS, "train_batch_size": 8}, world_size=2)
    changed = config.with_keys(hidden_size=64, train_micro_batch_size_per_gpu=2)
    assert (changed.model.intermediate_size, changed.model.head_size) == (256, 16)
    assert (changed.batch.gradient_accumulation_steps, changed.parallel.world_size) == (2, 2)
    assert (config.model.hidden_size, config.batch.train_micro_batch_size_per_gpu) == (32, 4)
    assert changed.with_keys(hidden_size=32, train_micro_batch_size_per_gpu=None) == config
    assert config.with_keys(**{"optimizer.params.lr": 0.5}).optimizer.lr == 0.5
    with pytest.raises(ConfigError, match="there is no key hiden_size"):
        config.with_keys(hiden_size=3)


def test_the_ranks_that_run_count_not_the_file_s() -> None:
    keys = {**KEYS, "world_size": 4, "train_batch_size": 8}
    assert config_from_keys(keys).batch.train_micro_batch_size_per_gpu == 2
    assert config_from_keys(keys, world_size=8).batch.train_micro_batch_size_per_gpu == 1
    assert config_from_keys(keys, world_size=8).parallel.data_parallel_size == 8


def test_importing_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import megatron_lite.config; "
        "print(time.process_time() - start); "
        "assert not {'torch', 'numpy', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert float(run.stdout) < 2  # 0.3 s is usual; a processor that others share counts theirs, too


def test_the_summary_says_what_will_run(tmp_path: Path) -> None:
    path = tmp_path / "small.yml"
    path.write_text(
        "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 16\nrope_fusion: true\n"
    )
    overrides = ["train_iters=1000", "train_batch_size=64", "num_kv_heads=2", "lr=3e-4", "zero_stage=2"]
    config = load_config([path], overrides, world_size=2)
    text = summary(
        config, parameters=12_345_678, kernels={"attention": "sdpa"}, memory=["1 GB a rank", "of 8 GB"]
    )
    assert text.startswith(config.messages[0])
    for fact in (
        "12.3M parameters",
        "2 layers of 32",
        "4 heads of 8 on 2 key/value heads",
        "64 x 16 = 1,024 tokens a step",
        "micro batch 32 x accumulation 1 x 2 ranks",
        "1,000 steps",
        "lr 0.0003",
        "warm-up 10 steps",
        "1.02M tokens in all",
        "2 ranks, ZeRO 2, fp32",
        "attention sdpa",
        "1 GB a rank",
        "of 8 GB",
        "embedded default",
        "runs/small",
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (1500, "1.5k"), (12_345_678, "12.3M"), (175 * 10**9, "175B"), (10**12, "1T")],
)
def test_short_counts(number: int, text: str) -> None:
    assert short_count(number) == text


@pytest.mark.parametrize("text", ["诗歌", "a\x85b", "a\u2028b 诗\u2029", "1e5", "0E0", "2026-01-31"])
def test_any_text_survives_the_saved_yaml(text: str, tmp_path: Path) -> None:
    config = config_from_keys({**KEYS, "prompt_end": text})
    (tmp_path / "saved.yml").write_text(config.to_yaml())
    assert load_config([tmp_path / "saved.yml"]).generation.prompt_end == text
