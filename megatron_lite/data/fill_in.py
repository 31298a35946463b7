"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): documents with their middle moved to the end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_lite.config.sections.objective import ObjectiveSection
from megatron_lite.data.cuts import TextCut, TokenCut
from megatron_lite.data.preprocessing.encode import token_id
from megatron_lite.data.samples import Window
from megatron_lite.data.tokenizers import Tokenizer
from megatron_lite.utils.errors import DataError


@dataclass(frozen=True)
class FillIn:
    """Rearranges documents of a window; all draws come from the generator that is handed in.

    With p, s, m standing for the three special tokens, a document becomes "p prefix s suffix m middle" (PSM)
    or "p s suffix m prefix middle" (SPM), cut in two random places.

    Attributes:
        rate: share of documents that are rearranged.
        spm_rate: share of these in the SPM form.
        prefix, suffix, middle: ids of the special tokens.
        eod_id: ends a document; it stays where it is.
        separator: id of the token that divides a document into fragments, each of which is rearranged by
            itself; None: the whole document is.
        fragment_rate: share of the fragments of such a document that are rearranged.
        padding: id that fills a window whose text takes fewer tokens than before, which is rare.
        cut: finds the two places.
    """

    rate: float
    spm_rate: float
    prefix: int
    suffix: int
    middle: int
    eod_id: int
    separator: int | None = None
    fragment_rate: float = 0.5
    padding: int = 0
    cut: TokenCut | TextCut = field(default_factory=TokenCut)

    @classmethod
    def of_keys(cls, keys: ObjectiveSection, tokenizer: Tokenizer) -> FillIn:
        """As the keys ``fim_*`` say. Raises DataError when one names no token."""

        def optional(name: str) -> int | None:
            token: str | None = getattr(keys, name)
            try:
                return None if token is None else token_id(tokenizer, token)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None

        def required(name: str) -> int:
            index = optional(name)
            assert index is not None, f"{name} has a default"
            return index

        padding = optional("fim_pad_token")
        return cls(
            rate=keys.fim_rate,
            spm_rate=keys.fim_spm_rate,
            prefix=required("fim_prefix_token"),
            suffix=required("fim_suffix_token"),
            middle=required("fim_middle_token"),
            eod_id=tokenizer.eod_id,
            separator=optional("fim_split_sample"),
            fragment_rate=keys.fim_fragment_rate,
            padding=tokenizer.eod_id if padding is None else padding,
            cut=TextCut(tokenizer, keys.fim_no_prefix),
        )

    def __call__(self, window: Window, random: np.random.Generator) -> Window:
        """``window`` int64 [n] with documents rearranged, n tokens again.

        A rearranged piece is three tokens longer than before, or some more where characters are cut off from
        their tokens; as many fall off the window's end.
        """
        ends = np.flatnonzero(window == self.eod_id)
        parts: list[np.ndarray] = []
        start = 0
        for end in [*ends.tolist(), len(window)]:
            document = window[start:end]
            is_chosen = random.random() < self.rate
            parts += [self._document(document, random) if is_chosen else document, window[end : end + 1]]
            start = end + 1
        changed = np.concatenate(parts)[: len(window)]
        return np.pad(changed, (0, len(window) - len(changed)), constant_values=self.padding)

    def _document(self, document: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if self.separator is None or not (document == self.separator).any():
            return self.rearranged(document, random)
        pieces = []
        for piece in np.split(document, np.flatnonzero(document == self.separator)):
            # all but the first begin with the separator
            head = len(piece) > 0 and int(piece[0] == self.separator)
            is_chosen = random.random() < self.fragment_rate
            pieces += [piece[:head], self.rearranged(piece[head:], random) if is_chosen else piece[head:]]
        return np.concatenate(pieces)

    def rearranged(self, piece: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """``piece`` (int64 [n]) in one of the two forms; as it is if it is empty or ``cut`` leaves it."""
        parts = self.cut(piece, random) if len(piece) else None
        if parts is None:
            return piece
        before, middle, after = parts
        if random.random() < self.spm_rate:
            order = [[self.prefix, self.suffix], after, [self.middle], before, middle]
        else:
            order = [[self.prefix], before, [self.suffix], after, [self.middle], middle]
        return np.concatenate([np.asarray(part, np.int64) for part in order])
