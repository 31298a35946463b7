"""Turn text into token files: ``preprocess_data.py --input text.jsonl --output-prefix data/my …``.

Writes ``PREFIX_KEY_document.bin`` and ``.idx`` (Megatron's format) for each JSON key. Takes GPT-NeoX's flags.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_lite.data.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocess import preprocess
from megatron_lite.data.tokenizers import REGISTRY
from megatron_lite.utils.errors import command_line


def positive(text: str) -> int:
    """``text`` as an integer above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders or patterns: .jsonl/.json (one object a line), any other file is one document; "
        "each may be compressed (.gz, .xz, .zst)",
    )
    text.add_argument(
        "--jsonl-keys", nargs="+", default=["text"], help="keys to read, an output each (default: text)"
    )
    text.add_argument("--num-docs", type=positive, help="documents in the input, if known, for the time left")
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", default="GPT2BPETokenizer", help=", ".join(REGISTRY))
    tokens.add_argument("--vocab-file", help="vocabulary in the type's format")
    tokens.add_argument("--merge-file", help="GPT-2's merges.txt")
    tokens.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    tokens.add_argument(
        "--encoder",
        choices=["fast", "reference"],
        default="fast",
        help="reference: encode by the tokenizer's own library even where gigatoken is faster",
    )
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


@command_line
def main() -> None:
    """Encode the input."""
    arguments = parse_arguments()
    settings = EncodeSettings(
        TokenizerSource(arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file),
        keys=tuple(arguments.jsonl_keys),
        append_eod=arguments.append_eod,
        reference=arguments.encoder == "reference",
    )
    report = preprocess(
        arguments.input,
        arguments.output_prefix,
        settings,
        workers=arguments.workers,
        log_interval=arguments.log_interval,
        num_docs=arguments.num_docs,
    )
    for key, prefix in report.prefixes.items():
        print(f"{prefix}: {report.documents:,} documents, {report.tokens[key]:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
