"""Keys of the data and the tokenizer."""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.fields import Bool, NonNegativeFloat, PositiveFloat, Section, Text, derived


class DataSection(Section):
    """Where tokens come from. A run that names no data reads the embedded default."""

    data_path: Text | None = None
    """Prefix of one `.bin`/`.idx` pair, divided into training, validation and test documents by `split`."""
    split: Text = "969, 30, 1"
    """Shares of training, validation and test documents of `data_path`."""
    train_data_paths: list[Text] | None = None
    """Prefixes of the training data; with them, `valid_data_paths` and `test_data_paths`."""
    valid_data_paths: list[Text] | None = None
    """Prefixes of the validation data."""
    test_data_paths: list[Text] | None = None
    """Prefixes of the test data."""
    train_data_weights: list[NonNegativeFloat] | None = None
    """How often to draw from each of `train_data_paths`. None: equally."""
    valid_data_weights: list[NonNegativeFloat] | None = None
    """How often to draw from each of `valid_data_paths`. None: equally."""
    test_data_weights: list[NonNegativeFloat] | None = None
    """How often to draw from each of `test_data_paths`. None: equally."""
    weight_by_num_documents: Bool = False
    """Weigh data sets by their number of documents to the power `weighted_sampler_alpha`, not by the weights
    given."""
    weighted_sampler_alpha: PositiveFloat = 1.0
    """1 draws in proportion to size; towards 0 all data sets are drawn equally."""
    eod_mask_loss: Bool = False
    """Leave end-of-document tokens out of the loss."""
    reset_attention_mask: Bool = False
    """Let no token see another document: one ends with each end-of-document token."""
    reset_position_ids: Bool = False
    """Count positions from the beginning of each document. Needs `reset_attention_mask`."""
    data_cache_dir: Text = derived("$XDG_CACHE_HOME (or ~/.cache) / megatron_lite")
    """Where the embedded default data is built, once a machine."""
    tokenizer_type: Literal[
        "GPT2BPETokenizer",
        "HFTokenizer",
        "SPMTokenizer",
        "TiktokenTokenizer",
        "CharLevelTokenizer",
        "ByteTokenizer",
        "CharacterTokenizer",
    ] = "GPT2BPETokenizer"
    """How text becomes tokens: GPT-2's vocab.json and merges.txt, a `tokenizer.json`, a sentencepiece model,
    a tiktoken file, bytes (`ByteTokenizer`, alias `CharLevelTokenizer`), or the characters listed in
    `vocab_file`."""
    vocab_file: Text | None = None
    """The tokenizer's file."""
    merge_file: Text | None = None
    """The merges of a `GPT2BPETokenizer`."""
