"""Floor 4: text out of a model."""

from megatron_lite.generation.load import TextModel, load_model
from megatron_lite.generation.sampling import Sampling
from megatron_lite.generation.text import Sample, generate, stream

__all__ = ["Sample", "Sampling", "TextModel", "generate", "load_model", "stream"]
