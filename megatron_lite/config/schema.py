"""The sections, and which of them a key belongs to."""

from __future__ import annotations

from megatron_lite.config.fields import Section
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

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "parallel": ParallelSection,
    "batch": BatchSection,
    "data": DataSection,
    "objective": ObjectiveSection,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "precision": PrecisionSection,
    "zero": ZeroSection,
    "training": TrainingSection,
    "checkpoint": CheckpointSection,
    "logging": LoggingSection,
    "generation": GenerationSection,
    "evaluation": EvaluationSection,
    "launcher": LauncherSection,
    "deepspeed": DeepSpeedSection,
}

SECTION_OF = {key: name for name, section in SECTIONS.items() for key in section.model_fields}
"""The section of every key."""
assert len(SECTION_OF) == sum(len(section.model_fields) for section in SECTIONS.values()), (
    "a key in two sections"
)
