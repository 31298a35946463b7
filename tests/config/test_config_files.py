"""The files of configs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_lite.config import load_config
from megatron_lite.config.reader import read_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yml"))
MODELS = [path for path in CONFIGS if any(entry.key == "num_layers" for entry in read_file(path))]
OVERLAYS = [path for path in CONFIGS if path not in MODELS]

GPT_NEOX_2_7B = """
pipe_parallel_size: 1
model_parallel_size: 1
num_layers: 32
hidden_size: 2560
num_attention_heads: 32
seq_length: 2048
max_position_embeddings: 2048
norm: layernorm
pos_emb: rotary
no_weight_tying: true
gpt_j_residual: false
output_layer_parallelism: column
scaled_upper_triang_masked_softmax_fusion: false
bias_gelu_fusion: false
rope_fusion: false
layernorm_fusion: false
init_method: small_init
output_layer_init_method: wang_init
optimizer: {type: Adam, params: {lr: 0.00016, betas: [0.9, 0.95], eps: 1.0e-8}}
min_lr: 0.000016
zero_optimization: {stage: 1, allgather_partitions: true, allgather_bucket_size: 500000000,
  overlap_comm: true, reduce_scatter: true, reduce_bucket_size: 500000000, contiguous_gradients: true}
train_micro_batch_size_per_gpu: 4
data_impl: mmap
checkpoint_activations: true
checkpoint_num_layers: 1
partition_activations: true
synchronize_each_layer: true
gradient_clipping: 1.0
weight_decay: 0.1
hidden_dropout: 0
attention_dropout: 0
fp16: {fp16: true, enabled: true, loss_scale: 0, loss_scale_window: 1000, hysteresis: 2, min_loss_scale: 1}
train_iters: 320000
lr_decay_iters: 320000
distributed_backend: nccl
lr_decay_style: cosine
warmup: 0.01
checkpoint_factor: 10000
eval_interval: 1000
eval_iters: 10
log_interval: 100
steps_per_print: 10
keep_last_n_checkpoints: 4
wall_clock_breakdown: true
"""

SHAPES = {
    "19M": (6, 512, 8),
    "49M": (10, 640, 10),
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "1-3B": (24, 2048, 16),
    "2-7B": (32, 2560, 32),
    "6-7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "20B": (44, 6144, 64),
    "175B": (96, 12288, 96),
}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_loads_alone(path: Path) -> None:
    config = load_config([path])
    assert config.training.train_iters > 0
    assert config.run_dir == Path("runs") / path.stem
    if path.stem != "2-7B":
        assert config.messages == ()
    if path.stem in SHAPES:
        model = config.model
        assert (model.num_layers, model.hidden_size, model.num_attention_heads) == SHAPES[path.stem]
        assert config.data.data_path is None
        assert config.data.train_data_paths is None


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("model", ["2-7B", "demo"])
def test_an_overlay_loads_over_a_model(path: Path, model: str) -> None:
    alone = load_config([ROOT / "configs" / f"{model}.yml"])
    both = load_config([ROOT / "configs" / f"{model}.yml", path])
    assert both.model == alone.model


def test_the_sizes_there_are() -> None:
    assert set(SHAPES) <= {path.stem for path in MODELS}


def test_2_7b_has_gpt_neox_s_values() -> None:
    assert yaml.safe_load((ROOT / "configs/2-7B.yml").read_text()) == yaml.safe_load(GPT_NEOX_2_7B)


@pytest.mark.parametrize(
    ("overlay", "precision", "stage"),
    [
        ("bf16", "bf16", 1),
        ("fp16", "fp16", 1),
        ("fp32", "fp32", 1),
        ("zero3", "fp16", 3),
        ("offload", "fp16", 3),
    ],
)
def test_overlays_do_what_they_say(overlay: str, precision: str, stage: int) -> None:
    config = load_config([ROOT / "configs/125M.yml", ROOT / "configs" / f"{overlay}.yml"])
    assert (config.precision.precision, config.zero.stage) == (precision, stage)
    assert config.zero.offload_param == config.zero.offload_optimizer == (overlay == "offload")
    assert config.zero.block["overlap_comm"] is True


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_header_says_the_command(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    (command,) = re.findall(r"python deepy\.py (train\.py .*)", header)
    script, *files = command.split()
    assert (ROOT / script).exists()
    assert f"configs/{path.name}" in files
    assert all((ROOT / file).exists() for file in files)


def test_character_shakespeare_is_the_known_recipe() -> None:
    config = load_config([ROOT / "configs/shakespeare_char.yml"])
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    assert (model.num_layers, model.num_attention_heads, model.hidden_size) == (4, 4, 128)
    assert (model.seq_length, config.batch.train_batch_size, config.training.train_iters) == (64, 12, 2000)
    assert (model.hidden_dropout, model.no_weight_tying, model.pos_emb) == (0, False, "learned")
    assert (optimizer.lr, schedule.min_lr, optimizer.betas) == (1e-3, 1e-4, (0.9, 0.99))
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.lr_decay_style) == (100, 2000, "cosine")
