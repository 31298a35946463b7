"""Look into token files: ``inspect_data.py data/my_text_document``.

Checks the index, every id against the vocabulary, and the checksums in the side file; shows counts, the
lengths of documents as a histogram, and decoded samples. The tokenizer is the one in the side file unless
another is given. Exit status 2 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.inspection import (
    Lengths,
    check_contents,
    check_ids,
    check_index,
    document_lengths,
    ended_documents,
    read_contents,
    recorded_tokenizer,
)
from megatron_lite.data.length_plot import check_picture, plot_lengths
from megatron_lite.data.preprocessing.encode import TokenizerSource
from megatron_lite.data.tokenizers import REGISTRY, Tokenizer, load_tokenizer
from megatron_lite.utils.errors import command_line

TOKENS_SHOWN = 60
"""Tokens of a sample; of a longer document the first and the last half as many."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefixes", type=Path, nargs="+", help="paths of pairs, with or without .bin or .idx")
    parser.add_argument("--tokenizer-type", help=", ".join(REGISTRY))
    parser.add_argument("--vocab-file", help="vocabulary in the type's format")
    parser.add_argument("--merge-file", help="GPT-2's merges.txt")
    parser.add_argument("--vocab-size", type=int, help="number of ids there are, if there is no tokenizer")
    parser.add_argument(
        "--samples", type=int, default=3, help="documents to show, evenly from all (default: 3)"
    )
    parser.add_argument("--plot", type=Path, help="picture of the lengths to write: .png, .svg or .pdf")
    return parser.parse_args()


def tokenizer_for(arguments: argparse.Namespace, prefix: Path) -> Tokenizer | None:
    """The tokenizer that the command line names, else that of the side file; None if there is neither."""
    if arguments.tokenizer_type is None:
        return recorded_tokenizer(prefix)
    return load_tokenizer(
        TokenizerSource(arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file)
    )


def inspect(prefix: Path, arguments: argparse.Namespace) -> Lengths:
    """Check and print one pair. Raises DataError at the first thing that is wrong."""
    corpus = IndexedDataset(prefix)
    check_index(corpus)
    lengths = document_lengths(corpus)
    print(prefix)
    print(f"  documents   {corpus.document_count:,} in {len(corpus.lengths):,} sequences")
    print(f"  tokens      {len(corpus.tokens):,} ({corpus.dtype.name}, {corpus.tokens.nbytes / 1e6:,.1f} MB)")
    print_lengths(lengths)
    contents = read_contents(corpus)
    tokenizer = tokenizer_for(arguments, prefix)
    vocab_size = arguments.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    print(
        f"  ids         {contents.smallest} to {contents.largest}"
        + (f" of 0 to {vocab_size - 1}" if vocab_size else " (no vocabulary to compare with)")
    )
    if vocab_size:
        check_ids(corpus, contents, vocab_size)
    if tokenizer:
        ended = ended_documents(corpus, tokenizer.eod_id)
        print(f"  ended       {ended:,} documents end with the end-of-document token {tokenizer.eod_id}")
    checked = check_contents(corpus, contents)
    print(f"  checksums   {'as in the side file' if checked else 'unknown: there is no side file'}")
    print_samples(corpus, tokenizer, arguments.samples)
    return lengths


def print_lengths(lengths: Lengths) -> None:
    """Statistics and the histogram in a line."""
    _, edges = lengths.histogram
    tokens = lengths.tokens
    print(
        f"  lengths     {tokens.min():,} to {tokens.max():,}, median {np.median(tokens):,.0f}, "
        f"mean {tokens.mean():,.1f}, {int((tokens == 0).sum()):,} empty"
    )
    print(f"              {edges[0]} {lengths.bars} {edges[-1]}  (doubling from bar to bar)")


def print_samples(corpus: IndexedDataset, tokenizer: Tokenizer | None, count: int) -> None:
    """Some documents as text, or as ids if there is no tokenizer."""
    for number in np.unique(np.linspace(0, corpus.document_count - 1, max(0, count)).astype(int)).tolist():
        ids = corpus.document(number).tolist()
        half = TOKENS_SHOWN // 2
        shown = [ids] if len(ids) <= TOKENS_SHOWN else [ids[:half], ids[-half:]]
        parts = [repr(tokenizer.decode(part)) if tokenizer else str(part) for part in shown]
        print(f"  document {number}, {len(ids):,} tokens: {' … '.join(parts)}")


@command_line
def main() -> None:
    """Inspect every pair."""
    arguments = parse_arguments()
    if arguments.plot:
        check_picture(arguments.plot)
    lengths = []
    for path in arguments.prefixes:
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        lengths.append(inspect(prefix, arguments).tokens)
    if arguments.plot:
        title = arguments.prefixes[0].name if len(lengths) == 1 else f"{len(lengths)} files"
        plot_lengths(Lengths(np.concatenate(lengths)), arguments.plot, title)
        print(f"wrote {arguments.plot}")


if __name__ == "__main__":
    sys.exit(main())
