"""Turn text into token files: ``preprocess_data.py --input text.jsonl --output-prefix data/my …``.

Writes ``PREFIX_KEY_document.bin`` and ``.idx`` (Megatron's format) and ``.json`` (counts, sources, checksums)
for each JSON key. Takes GPT-NeoX's flags. A run that was killed continues when the same command is given
again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.run import Report, preprocess
from megatron_lite.data.preprocessing.transforms import TextSettings
from megatron_lite.data.tokenizers import REGISTRY
from megatron_lite.utils.errors import command_line


def positive(text: str) -> int:
    """``text`` as an integer above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def add_text(parser: argparse.ArgumentParser) -> None:
    """Options of what is read."""
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, patterns, - (standard input), hf:NAME[:SPLIT]: .jsonl/.json (one object a "
        "line), .parquet, .arrow, .tar, any other file is text; .gz, .xz, .zst and .bz2 are decompressed",
    )
    text.add_argument(
        "--jsonl-keys",
        nargs="+",
        default=["text"],
        help="keys to read, an output each; nested ones as a.b (default: text)",
    )
    text.add_argument("--num-docs", type=positive, help="documents in the input, if known, for the time left")
    text.add_argument(
        "--separator", help="divides a text file into documents (\\n, \\t as in Python); else a file is one"
    )
    text.add_argument("--ftfy", action="store_true", help="mend wrongly decoded text (slow)")
    text.add_argument("--normalize", choices=["NFC", "NFKC", "NFD", "NFKD"], help="Unicode normal form")
    text.add_argument("--min-length", type=positive, default=0, help="leave out texts of fewer characters")
    text.add_argument(
        "--filter",
        metavar="CONDITION",
        help="take only records with KEY, KEY=VALUE, KEY!=VALUE, KEY>=NUMBER …",
    )
    text.add_argument(
        "--on-error", choices=["stop", "skip"], default="stop", help="what a bad record does (default: stop)"
    )
    text.add_argument(
        "--invalid-utf8",
        choices=["error", "replace"],
        default="error",
        help="replace: bytes that are not UTF-8 become U+FFFD; error: the record is bad",
    )


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Options of how text is encoded."""
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", default="GPT2BPETokenizer", help=", ".join(REGISTRY))
    tokens.add_argument("--vocab-file", help="vocabulary in the type's format")
    tokens.add_argument("--merge-file", help="GPT-2's merges.txt")
    tokens.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    tokens.add_argument(
        "--prepend-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="special tokens or ids before each document",
    )
    tokens.add_argument(
        "--append-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="special tokens or ids after each document",
    )
    tokens.add_argument(
        "--max-tokens", type=positive, help="cut longer documents into several of at most so many tokens"
    )
    tokens.add_argument(
        "--encoder",
        choices=["fast", "reference"],
        default="fast",
        help="reference: encode by the tokenizer's own library even where gigatoken is faster",
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text(parser)
    add_tokens(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix", type=Path, required=True, help="outputs, without _KEY_document.bin"
    )
    output.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="the one format there is")
    runtime = parser.add_argument_group("runtime")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runtime.add_argument(
        "--workers", type=positive, default=cores, help=f"processes (default: all cores, {cores})"
    )
    runtime.add_argument(
        "--log-interval", type=positive, default=100, help="documents between progress lines, at least"
    )
    return parser.parse_args()


def unescaped(text: str) -> str:
    """``text`` with ``\\n`` and the like as the characters they stand for."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def settings_of(arguments: argparse.Namespace) -> EncodeSettings:
    """What the command line asks to become of each record."""
    separator: str | None = arguments.separator
    return EncodeSettings(
        TokenizerSource(arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file),
        keys=tuple(arguments.jsonl_keys),
        append_eod=arguments.append_eod,
        prepend=tuple(arguments.prepend_tokens),
        append=tuple(arguments.append_tokens),
        max_tokens=arguments.max_tokens,
        separator=separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
        if separator
        else None,
        reference=arguments.encoder == "reference",
        text=TextSettings(
            ftfy=arguments.ftfy,
            normal_form=arguments.normalize,
            min_length=arguments.min_length,
            filter=arguments.filter,
            replace_invalid=arguments.invalid_utf8 == "replace",
        ),
    )


def print_summary(report: Report) -> None:
    """The counts of each output."""
    totals = report.totals
    for key, counts in totals.keys.items():
        print(
            f"{report.prefixes[key]}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
            f"{counts.text_bytes / max(1, counts.tokens):.3f} bytes per token, ids {counts.smallest} to "
            f"{counts.largest}"
        )
    if totals.bad or totals.dropped:
        print(f"left out: {totals.bad:,} bad records, {totals.dropped:,} by --min-length and --filter")
    if report.was_there:
        print("nothing to do: the same command has made these files before")


@command_line
def main() -> None:
    """Encode the input."""
    arguments = parse_arguments()
    report = preprocess(
        arguments.input,
        arguments.output_prefix,
        settings_of(arguments),
        workers=arguments.workers,
        log_interval=arguments.log_interval,
        num_docs=arguments.num_docs,
        on_error=arguments.on_error,
    )
    print_summary(report)


if __name__ == "__main__":
    sys.exit(main())
