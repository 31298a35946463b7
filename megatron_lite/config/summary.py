"""What will run, on one page. Figures that are computed above this floor come as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_lite.config.config import Config
from megatron_lite.config.layout_table import group_lines, holdings


def summary(
    config: Config,
    parameters: int | None = None,
    kernels: Mapping[str, str] | None = None,
    memory: Sequence[str] = (),
    active: int | None = None,
) -> str:
    """The lines to print before a run: messages of the configuration, then model, data, batch, ... by name.

    ``parameters`` is their number, ``kernels`` maps a part to the implementation chosen for it, ``memory``
    are the planner's lines, ``active`` is how many of the parameters one token meets."""
    chosen = ", ".join(f"{part} {kernel}" for part, kernel in (kernels or {}).items())
    lines = [
        ("model", _model(config, parameters, active)),
        ("data", _data(config)),
        ("batch", _batch(config)),
        ("training", _training(config)),
        ("layout", _layout(config)),
        *(("", line) for line in group_lines(config)),
        *_named("each rank", holdings(config)),
        ("kernels", chosen),
        *_named("memory", memory),
        ("output", str(config.run_dir)),
        ("tasks", _tasks(config)),
    ]
    return "\n".join([*config.messages, *(f"{name:<10}{text}" for name, text in lines if text)])


def _named(name: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """``lines`` with their name before the first."""
    return [("" if number else name, line) for number, line in enumerate(lines)]


def short_count(number: int) -> str:
    """``1234567`` as ``1.23M``: three digits, for people."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _model(config: Config, parameters: int | None, active: int | None) -> str:
    model = config.model
    heads = f"{model.num_attention_heads} heads of {model.head_size}"
    if model.num_kv_heads != model.num_attention_heads:
        heads += f" on {model.num_kv_heads} key/value heads"
    positions = (
        f"rotary {model.rotary_pct:.0%}" if model.pos_emb == "rotary" else f"{model.pos_emb} positions"
    )
    if model.rope_scaling.rope_type != "default":
        positions += f" scaled by {model.rope_scaling.rope_type}"
    parts = [
        f"{model.num_layers} layers of {model.hidden_size}",
        heads,
        f"{model.activation} MLP of {model.ffn_size}",
        _experts(config),
        positions,
        "" if model.causal else "attention in both directions",
        _windows(model.attention_windows),
        model.norm,
        "parallel residual" if model.gpt_j_residual else "",
        "untied head" if model.no_weight_tying else "tied head",
    ]
    described = ", ".join(part for part in parts if part)
    if parameters is None:
        return described
    some = f" ({short_count(active)} active)" if active not in (None, parameters) else ""
    return f"{short_count(parameters)} parameters{some}: {described}"


def _experts(config: Config) -> str:
    """How many experts there are, and where; nothing without."""
    model = config.model
    mixtures = model.mlp_kinds.count("experts")
    if not mixtures:
        return ""
    return f"{model.moe_num_experts} experts (top {model.moe_top_k}) in {mixtures} of the layers"


def _windows(windows: Sequence[int | None]) -> str:
    widths = [width for width in windows if width is not None]
    if not widths:
        return ""
    where = "" if len(widths) == len(windows) else f" in {len(widths)} layers"
    return f"window of {widths[0]} tokens{where}"


def _data(config: Config) -> str:
    data = config.data
    listed = [prefix for prefix, *_ in data.datasets or []]
    paths = data.train_data_paths or listed or ([data.data_path] if data.data_path else [])
    if not paths:
        return "the embedded default: the source text of Python's standard library"
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    apart = ", documents apart" if data.reset_attention_mask or data.pack_impl != "packed" else ""
    return f"{paths[0]}{more}, {data.tokenizer_type} {data.vocab_file or ''}".rstrip() + apart


def _tasks(config: Config) -> str:
    """Where the tasks of ``eval_tasks`` are evaluated; nothing without."""
    if not config.evaluation.eval_tasks:
        return ""
    names = ", ".join(config.evaluation.eval_tasks)
    return f"{names}: not while training; on any checkpoint with tools/evaluate.py (docs/evaluation.md)"


def _batch(config: Config) -> str:
    batch, length = config.batch, config.model.seq_length
    tokens = batch.train_batch_size * length
    line = (
        f"{batch.train_batch_size} x {length} = {tokens:,} tokens a step (micro batch "
        f"{batch.train_micro_batch_size_per_gpu} x accumulation {batch.gradient_accumulation_steps} x "
        f"{_ranks(config.parallel.data_parallel_size)})"
    )
    if batch.rampup_batch_size is None:
        return line
    start, increment, over = batch.rampup_batch_size
    return f"{line}, growing from {start} by {increment} over {short_count(over)} tokens"


def _training(config: Config) -> str:
    steps, schedule, optimizer = config.training.train_iters, config.schedule, config.optimizer
    warmup = schedule.warmup_steps
    length = f"{warmup} steps" if warmup is not None else f"{schedule.warmup_tokens} tokens"
    line = f"{steps:,} steps, {optimizer.type}, lr {optimizer.lr:g}"
    line += f" {schedule.lr_decay_style} to {schedule.min_lr:g}, warm-up {length}"
    if config.batch.rampup_batch_size is None:
        tokens = steps * config.batch.train_batch_size * config.model.seq_length
        line += f"; {short_count(tokens)} tokens in all"
    return line


def _layout(config: Config) -> str:
    ranks, zero = config.parallel.world_size, config.zero
    other = config.engine_stage != zero.stage and config.parallel.replicas > 1
    stage = f"ZeRO {zero.stage}" + (f" (runs as {config.engine_stage})" if other else "")
    parts = [_ranks(ranks), stage, config.precision.precision]
    if zero.offload_optimizer:
        parts.append("optimizer offloaded")
    if zero.offload_param:
        parts.append("parameters offloaded")
    if config.parallel.context_parallel_size > 1:
        parts.append("context by ring" if config.context_by_ring else "context by Ulysses")
    if config.model.checkpoint_activations:
        parts.append("activations recomputed")
    return ", ".join(parts)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
