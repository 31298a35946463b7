"""Keys of text generation."""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.fields import (
    Bool,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Section,
    Text,
    derived,
)


class GenerationSection(Section):
    """How a trained model writes."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] = derived(
        "input-file with a sample_input_file, else unconditional"
    )
    """Where prompts come from."""
    temperature: NonNegativeFloat = 0.0
    """Spread of the sampling; 0 takes the likeliest token."""
    top_k: NonNegative = 0
    """Sample from the k likeliest tokens only; 0: from all."""
    top_p: Fraction = 0.0
    """Sample from the fewest tokens that hold this probability; 0: from all."""
    maximum_tokens: Positive = 64
    """Tokens to generate."""
    prompt_end: str = "\n"
    """What ends a prompt typed in."""
    sample_input_file: Text | None = None
    """One prompt a line."""
    sample_output_file: Text | None = None
    """Where samples are written, one JSON object a line; without it they are printed."""
    num_samples: Positive = 1
    """Samples without a prompt."""
    recompute: Bool = False
    """Recompute keys and values instead of keeping them."""
