"""A run's configuration: from files, overrides or plain keys to a frozen, resolved :class:`Config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lite.config.contradiction import Contradiction
from megatron_lite.config.derive import derive
from megatron_lite.config.keys import has_effect, typed_value
from megatron_lite.config.layout_rules import context_kind
from megatron_lite.config.merge import merge
from megatron_lite.config.older_keys import rewrite
from megatron_lite.config.reader import Entry, normal_key, read_file, read_override, to_yaml
from megatron_lite.config.schema import SECTIONS
from megatron_lite.config.sections.batch import BatchSection
from megatron_lite.config.sections.checkpoint import CheckpointSection
from megatron_lite.config.sections.data import DataSection
from megatron_lite.config.sections.deepspeed import DeepSpeedSection
from megatron_lite.config.sections.evaluation import EvaluationSection
from megatron_lite.config.sections.generation import GenerationSection
from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.config.sections.logging import LoggingSection
from megatron_lite.config.sections.model import ModelSection
from megatron_lite.config.sections.objective import ObjectiveSection
from megatron_lite.config.sections.optimizer import OptimizerSection
from megatron_lite.config.sections.parallel import ParallelSection
from megatron_lite.config.sections.precision import PrecisionSection
from megatron_lite.config.sections.schedule import ScheduleSection
from megatron_lite.config.sections.training import TrainingSection
from megatron_lite.config.sections.zero import ZeroSection
from megatron_lite.utils.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """A run, fully resolved. Equal when every resolved key is equal.

    ``given`` holds the keys as they were given, before anything was derived; ``messages`` what the reader has
    to tell (overridden and retired keys), one line each."""

    model: ModelSection
    parallel: ParallelSection
    batch: BatchSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    precision: PrecisionSection
    zero: ZeroSection
    training: TrainingSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    generation: GenerationSection
    evaluation: EvaluationSection
    launcher: LauncherSection
    deepspeed: DeepSpeedSection
    given: Mapping[str, Any] = field(compare=False, repr=False)
    messages: tuple[str, ...] = field(compare=False, repr=False)

    @property
    def context_by_ring(self) -> bool:
        """Whether ranks that share a sequence pass keys and values round, and do not exchange heads."""
        parallel, heads = self.parallel, self.model.num_attention_heads
        kind, sizes = (
            parallel.context_parallel_kind,
            (parallel.model_parallel_size, parallel.context_parallel_size),
        )
        return context_kind(kind, heads, *sizes) == "ring"

    @property
    def engine_stage(self) -> int:
        """ZeRO's stage as it runs: 0 with pipeline stages or in 16 bits runs as 1.

        DeepSpeed's stage 0 reports a pipeline's norm without most of what later stages hold. In 16 bits it
        gives a client optimizer FP16_UnfusedOptimizer: that accumulates gradients in 16 bits, makes its fp32
        copies one parameter at a time, and in fp16 ``engine.backward`` never applies the loss scale that its
        ``step`` divides by. Stage 1 has the same updates with fp32 accumulation, no more traffic
        (reduce-scatter and all-gather are what an all-reduce is made of) and less memory; with one rank the
        two are the same thing.
        """
        as_given = self.parallel.pipe_parallel_size <= 1 and self.precision.precision == "fp32"
        return self.zero.stage if as_given else max(1, self.zero.stage)

    @property
    def run_dir(self) -> Path:
        """Folder of the run: resolved configuration, metrics, checkpoints."""
        return Path(self.checkpoint.run_dir)

    def with_keys(self, **keys: Any) -> Config:
        """A new configuration: the keys given before and these, resolved again."""
        changed = _resolve([_entries(self.given), _entries(keys)], self.parallel.world_size, name="run")
        return replace(changed, messages=self.messages)

    def flat(self) -> dict[str, Any]:
        """Every resolved key, JSON-able; ``config_from_keys(config.flat()) == config``."""
        flat: dict[str, Any] = {}
        for name in SECTIONS:
            flat |= getattr(self, name).model_dump(mode="json")
        return flat

    def to_yaml(self) -> str:
        """:meth:`flat` as YAML; the file loads again to an equal configuration."""
        return to_yaml(self.flat())


def load_config(
    paths: Sequence[Path | str],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of ``paths``, later ones overriding earlier ones, then of ``key=value`` overrides.

    ``world_size`` is the number of ranks that will run; without it, the key ``world_size``, or 1. The keys of
    ``base`` come before the first file. Raises :class:`ConfigError`.
    """
    sources = [_entries(base or {})]
    sources += [read_file(Path(path)) for path in paths] + [[read_override(word)] for word in overrides]
    return _resolve(sources, world_size, name=Path(paths[0]).stem if paths else "run")


def config_from_keys(keys: Mapping[str, Any], world_size: int | None = None) -> Config:
    """The configuration of flat ``keys`` (dashes and dots allowed), checked and derived as files are."""
    return _resolve([_entries(keys)], world_size, name="run")


def _entries(keys: Mapping[str, Any]) -> list[Entry]:
    return [Entry(normal_key(key), value) for key, value in keys.items()]


def _resolve(sources: Sequence[Sequence[Entry]], world_size: int | None, name: str) -> Config:
    """The configuration that ``sources`` make; ``name`` names its folder when no key does."""
    messages: list[str] = []
    known = [[entry for entry in source if has_effect(entry, messages)] for source in sources]
    merged = rewrite(merge(known, messages), messages)
    if world_size is not None:
        merged["world_size"] = Entry("world_size", world_size)
    merged.setdefault("run_dir", Entry("run_dir", f"runs/{name}"))
    typed = {key: typed_value(entry) for key, entry in merged.items()}
    try:
        keys = derive(typed)
    except Contradiction as error:
        places = [
            f"{key} in {merged[key].origin}" for key in error.keys if key in merged and merged[key].origin
        ]
        raise ConfigError(f"{error} ({', '.join(places)})" if places else str(error)) from None
    sections: dict[str, Any] = {}
    for part, section in SECTIONS.items():
        sections[part] = section(**{key: keys[key] for key in section.model_fields if key in keys})
    given = {key: entry.value for key, entry in merged.items()}
    return Config(**sections, given=given, messages=tuple(messages))
