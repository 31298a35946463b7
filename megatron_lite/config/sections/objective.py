"""Keys of what is learned from samples, where that is not the next token of plain text."""

from __future__ import annotations

from megatron_lite.config.fields import Bool, Fraction, NonNegative, Probability, Section, Text


class ObjectiveSection(Section):
    """Fill-in-the-middle and masked language modelling."""

    fim_rate: Fraction = 0.0
    """Share of documents (parts of documents, in a sample) whose middle is moved to their end, so that a
    model learns to fill in. 0: none."""
    fim_spm_rate: Fraction = 0.5
    """Share of these that begin with the suffix (SPM); the others begin with the prefix (PSM)."""
    fim_prefix_token: Text = "<|fim_prefix|>"
    """The token before a prefix; like all of `fim_`, one token of the vocabulary, by its text or id."""
    fim_middle_token: Text = "<|fim_middle|>"
    """The token before a middle."""
    fim_suffix_token: Text = "<|fim_suffix|>"
    """The token before a suffix."""
    fim_split_sample: Text | None = None
    """A token that divides a document into fragments (files of a repository, say): each is rearranged by
    itself."""
    fim_fragment_rate: Fraction = 0.5
    """Share of fragments that are rearranged in documents that have any."""
    fim_no_prefix: Text | None = None
    """Documents (or fragments) whose text begins with this are not rearranged."""
    fim_pad_token: Text | None = None
    """The token that fills a sample whose rearranged text takes fewer tokens than before, which is rare. Left
    out: the end-of-document token."""
    mlm_training: Bool = False
    """Learn to find hidden tokens (BERT) in place of the next one, by attention in both directions. Such a
    model cannot write text."""
    mlm_mask_id: NonNegative | None = None
    """Id of the token that stands for hidden ones. Needed by `mlm_training`."""
    mlm_cls_token_id: NonNegative | None = None
    """Id of a token that is put before every sample."""
    mlm_mask_prob: Probability = 0.15
    """Share of tokens that are to be found."""
    mlm_same_token_prob: Fraction = 0.1
    """Share of these that stay as they are."""
    mlm_random_token_prob: Fraction = 0.1
    """Share of these that become a random token; the rest is hidden."""
    mlm_mask_ignore_ids: list[NonNegative] | None = None
    """Ids that are never chosen, besides the end-of-document token and those of `mlm_`."""
