"""From what a configuration says about data to what a run needs: paths, tokenizer, vocabulary size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.data.embedded import VOCAB_SIZE, embedded_data
from megatron_lite.data.sources import sources_of
from megatron_lite.data.tokenizers import load_tokenizer
from megatron_lite.utils.errors import DataError

if TYPE_CHECKING:
    from megatron_lite.config import Config

NEEDS_NO_FILE = {"ByteTokenizer", "CharLevelTokenizer"}
"""Tokenizers that are complete without a vocabulary file."""


def prepare_data(config: Config) -> Config:
    """``config`` with data paths, tokenizer and ``vocab_size`` filled in.

    Without data it takes the embedded default (see :mod:`megatron_lite.data.embedded`), with the tokenizer
    that the configuration names or else a BPE of ``vocab_size`` (at most 8192) trained on it.

    Raises:
        DataError: data is named but no tokenizer, a file is missing, or ``vocab_size`` is too small for the
            tokenizer.
    """
    data = config.data
    names_tokenizer = data.vocab_file is not None or data.tokenizer_type in NEEDS_NO_FILE
    prefixes = [source.prefix for source in sources_of(data, "train")]
    names_data = bool(prefixes)
    if names_data and not names_tokenizer:
        raise DataError(
            f"the configuration names data ({', '.join(prefixes)}) "
            "but no vocabulary: give vocab_file and tokenizer_type, those the data was made with"
        )
    if not names_data and (data.valid_data_paths or data.test_data_paths):
        raise DataError(
            "the configuration names validation or test data but no train_data_paths: give them too"
        )
    vocab_size = config.model.vocab_size
    if not names_data:
        config = _with_embedded(config, names_tokenizer)
    tokenizer = load_tokenizer(config.data)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"vocab_size {vocab_size} is smaller than the {tokenizer.vocab_size} ids of the "
            f"{config.data.tokenizer_type} {config.data.vocab_file or ''}: leave vocab_size out or raise it"
        )
    return config.with_keys(vocab_size=vocab_size or tokenizer.vocab_size)


def _with_embedded(config: Config, names_tokenizer: bool) -> Config:
    cache = Path(config.data.data_cache_dir).expanduser()
    if names_tokenizer:
        embedded = embedded_data(cache, tokenizer=load_tokenizer(config.data))
        return config.with_keys(data_path=str(embedded.prefix))
    embedded = embedded_data(cache, min(VOCAB_SIZE, config.model.vocab_size or VOCAB_SIZE))
    return config.with_keys(
        data_path=str(embedded.prefix), tokenizer_type="HFTokenizer", vocab_file=str(embedded.tokenizer_file)
    )
