"""Keys of the data and the tokenizer."""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.fields import (
    Bool,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Text,
    derived,
)

SamplingMode = Literal["windows", "chunks", "documents_random", "documents_fixed"]


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
    train_label_data_paths: list[Text] | None = None
    """Prefixes of label files, one for each of `train_data_paths`: as many tokens in the same places,
    negative where nothing is to be learned. `tools/preprocess_data_with_chat_template.py` writes them."""
    valid_label_data_paths: list[Text] | None = None
    """The same for `valid_data_paths`."""
    test_label_data_paths: list[Text] | None = None
    """The same for `test_data_paths`."""
    datasets: list[tuple[Text, Positive | None, SamplingMode, NonNegativeFloat | None]] | None = None
    """GPT-Neo's list of the training data, in place of `data_path`: for each its prefix, `stitch`,
    `sampling_mode` and weight, as `[data/web_text_document, 25, documents_random, 0.7]`. `split` divides
    each, unless there are `valid_data_paths` or `test_data_paths`."""
    sampling_mode: SamplingMode = "windows"
    """How samples are cut. `windows`: all text end to end, cut into windows that are shuffled; GPT-Neo's
    `chunks`: cut one after another, in the order of the file; `documents_random`, `documents_fixed`: `stitch`
    shuffled documents joined, of which a random window, or the beginning, is taken."""
    stitch: Positive = 1
    """Documents that are joined for a sample of the `documents_` sampling modes."""
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """Samples are `packed`: cut by `sampling_mode`, across documents; or whole documents that do not see each
    other, padded: as many as fit (`pack_until_overflow`) or one (`unpacked`)."""
    allow_chopped: Bool = True
    """Cut off documents of more than `seq_length` + 1 tokens; false: leave them out. For whole documents."""
    train_data_weights_schedule: list[tuple[Positive, list[NonNegativeFloat]]] | None = None
    """Weights of the training data that take the place of earlier ones at given steps, as
    `[[1000, [0.5, 0.5]], [2000, [0, 1]]]`. Each data set goes on where it was."""
    data_temperature: PositiveFloat | None = None
    """T weighs data sets by their weights, or by their tokens if no weights are given, to the power 1/T: 1 in
    proportion, more draws small ones oftener."""
    weight_by_num_documents: Bool = False
    """Weigh data sets by their number of documents to the power `weighted_sampler_alpha`, not by the weights
    given."""
    weighted_sampler_alpha: PositiveFloat = 1.0
    """1 draws in proportion to size; towards 0 all data sets are drawn equally."""
    eod_mask_loss: Bool = False
    """Leave end-of-document tokens out of the loss."""
    reset_attention_mask: Bool = False
    """Let no token see another document: one ends with each end-of-document token."""
    reset_position_ids: Bool = derived("whether documents are whole (`pack_impl`)")
    """Count positions from the beginning of each document. Needs `reset_attention_mask`, or whole documents
    (`pack_impl`), for which it is the default."""
    accept_changed_data: Bool = False
    """Go on from a checkpoint though the data files have changed since it was written."""
    data_cache_dir: Text = derived("$XDG_CACHE_HOME (or ~/.cache) / megatron_lite")
    """Where the embedded default data is built, once a machine, and where files from object storage are
    kept."""
    data_cache_gigabytes: PositiveFloat = 50.0
    """How much of the `.bin` files from object storage (`s3://`, `gs://`, `http://`) is kept at once."""
    tokenizer_type: Literal[
        "GPT2BPETokenizer",
        "HFTokenizer",
        "SPMTokenizer",
        "JiebaTokenizer",
        "TiktokenTokenizer",
        "CharLevelTokenizer",
        "ByteTokenizer",
        "CharacterTokenizer",
    ] = "GPT2BPETokenizer"
    """How text becomes tokens: GPT-2's vocab.json and merges.txt, a `tokenizer.json`, a sentencepiece model,
    either of these two over words that jieba has cut (`JiebaTokenizer`, for Chinese), a tiktoken file, bytes
    (`ByteTokenizer`, alias `CharLevelTokenizer`), or the characters listed in `vocab_file`."""
    vocab_file: Text | None = None
    """The tokenizer's file."""
    merge_file: Text | None = None
    """The merges of a `GPT2BPETokenizer`."""
