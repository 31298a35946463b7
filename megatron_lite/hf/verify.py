"""Does the exported folder compute what the model computes? Asked of transformers itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lite.data.tokenizers import Tokenizer
from megatron_lite.model import GPT
from megatron_lite.utils.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of a logit that two correct fp32 implementations show."""

SEQUENCES, LENGTH = 2, 64
"""Of the random tokens whose logits are compared."""

TEXT_TOKENS = 4096
"""Random tokens whose text both tokenizers are given: every token of a small vocabulary occurs."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        largest_difference: of a logit, over random tokens, both models in fp32 with the folder's weights.
        same_tokens: whether both tokenizers cut a text into the same ids.
    """

    largest_difference: float
    same_tokens: bool

    @property
    def passed(self) -> bool:
        """Whether the folder is the model (NaN is not)."""
        return self.largest_difference <= TOLERANCE and self.same_tokens

    def report(self) -> str:
        """One line for a person."""
        return (
            f"{'verified' if self.passed else 'NOT the same model'}: "
            f"largest logit difference {self.largest_difference:.2e} (at most {TOLERANCE:.0e}), "
            f"token ids {'equal' if self.same_tokens else 'differ'}"
        )


@torch.no_grad()
def verify_folder(
    folder: Path, gpt: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None = None
) -> Verification:
    """Load ``folder`` with AutoModelForCausalLM and AutoTokenizer; compare with ``gpt`` (fp32, on the CPU).

    The weights of both are rounded to ``dtype`` first, where one of them is in that dtype: so it is held to
    the same tolerance. None: they must be the same as they are.

    Raises:
        UserError: transformers finds tensors missing or left over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {kind: sorted(names) for kind, names in report.items() if names}
    if problems:
        raise UserError(f"{folder}: transformers does not load it cleanly: {problems}")
    if dtype is not None:
        for parameter in (*gpt.parameters(), *theirs.parameters()):
            parameter.copy_(parameter.to(dtype).float())

    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, gpt.config.seq_length)
    tokens = torch.randint(
        0, min(tokenizer.vocab_size, theirs.config.vocab_size), (SEQUENCES, length), generator=generator
    )
    expected = theirs.eval()(tokens).logits
    # An import may have added rows to the vocabulary.
    difference = (gpt.eval()(tokens)[..., : expected.shape[-1]] - expected).abs().max().item()

    ids = torch.randint(0, tokenizer.vocab_size, (TEXT_TOKENS,), generator=generator).tolist()
    text = tokenizer.decode([token for token in ids if token != tokenizer.eod_id])
    same = AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer.encode(text)
    return Verification(difference, same)
