"""Masked language modelling (Devlin et al., BERT, arXiv 1810.04805): tokens are hidden and to be found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_lite.config.sections.objective import ObjectiveSection
from megatron_lite.data.samples import UNCOUNTED, Sample, Window
from megatron_lite.data.tokenizers import Tokenizer
from megatron_lite.utils.errors import DataError


@dataclass(frozen=True)
class Masking:
    """Hides tokens of a window; all draws come from the generator that is handed in.

    Each token is chosen with probability ``rate``; special ones never are. Of the chosen, a share stays as it
    is, a share becomes a random token, and the rest ``mask_id``. The labels are the chosen tokens, in their
    own places.

    Attributes:
        rate: share of tokens to be found.
        same, random: shares of these that stay, and that become a random token.
        mask_id: stands for the others.
        cls_id: put before every sample; None: nothing is.
        ignored: ids that are never chosen, and never stand for another.
        vocab_size: ids of the tokenizer, from which random tokens are drawn.
    """

    rate: float
    same: float
    random: float
    mask_id: int
    cls_id: int | None
    ignored: tuple[int, ...]
    vocab_size: int

    @classmethod
    def of_keys(cls, keys: ObjectiveSection, tokenizer: Tokenizer, vocab_size: int) -> Masking:
        """As the keys ``mlm_*`` say, with ids of a model's vocabulary of ``vocab_size``, which may be larger
        than the tokenizer's. Raises DataError when an id is not in it."""
        assert keys.mlm_mask_id is not None, "the configuration's rules ask for it"
        special = {tokenizer.eod_id, keys.mlm_mask_id, *(keys.mlm_mask_ignore_ids or [])}
        if keys.mlm_cls_token_id is not None:
            special.add(keys.mlm_cls_token_id)
        if max(special) >= vocab_size:
            raise DataError(
                f"mlm_mask_id, mlm_cls_token_id or mlm_mask_ignore_ids has the id {max(special)}, outside "
                f"the vocabulary of {vocab_size}: correct it, or raise vocab_size"
            )
        shares = keys.mlm_mask_prob, keys.mlm_same_token_prob, keys.mlm_random_token_prob
        ids = keys.mlm_mask_id, keys.mlm_cls_token_id
        return cls(*shares, *ids, tuple(sorted(special)), tokenizer.vocab_size)

    def __call__(self, window: Window, random: np.random.Generator) -> Sample:
        """The sample of ``window`` (int64 [seq_length + 1]): of its beginning, since nothing is shifted."""
        tokens = window[:-1].copy()
        if self.cls_id is not None:
            tokens = np.concatenate([[self.cls_id], tokens[:-1]])
        draws, fates = random.random((2, len(tokens)))
        chosen = (draws < self.rate) & ~np.isin(tokens, self.ignored)
        labels = np.where(chosen, tokens, UNCOUNTED)
        is_random = chosen & (self.same <= fates) & (fates < self.same + self.random)
        tokens[chosen & (fates >= self.same + self.random)] = self.mask_id
        tokens[is_random] = self._random_tokens(int(is_random.sum()), random)
        return Sample(tokens, labels)

    def _random_tokens(self, count: int, random: np.random.Generator) -> np.ndarray:
        """``count`` ids, each that is not ignored equally often."""
        left_out = [token for token in self.ignored if token < self.vocab_size]
        tokens = random.integers(0, self.vocab_size - len(left_out), count)
        for token in left_out:  # in rising order: each makes room for itself
            tokens += tokens >= token
        return tokens
