"""Make a vocabulary from text: ``train_tokenizer.py --input text.jsonl --output tokenizer.json``.

HFTokenizer: byte-level BPE as a tokenizer.json. SPMTokenizer: a sentencepiece model. CharacterTokenizer: a
JSON file of the characters. Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.data.tokenizers.characters import write_character_vocabulary
from megatron_lite.data.vocabulary import write_byte_level_bpe, write_sentencepiece
from megatron_lite.utils.errors import DataError, command_line


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders or patterns, as for tools/preprocess_data.py",
    )
    parser.add_argument("--jsonl-keys", nargs="+", default=["text"], help="keys to read (default: text)")
    parser.add_argument(
        "--tokenizer-type",
        choices=["HFTokenizer", "SPMTokenizer", "CharacterTokenizer"],
        default="HFTokenizer",
    )
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="of an SPMTokenizer")
    parser.add_argument(
        "--vocab-size", type=int, default=50304, help="number of ids (characters: as many as there are)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    return parser.parse_args()


@command_line
def main() -> None:
    """Train and write."""
    arguments = parse_arguments()
    output: Path = arguments.output
    if output.exists():
        raise DataError(f"{output} exists and is left as it is: delete it or give another --output")
    texts = read_texts(arguments.input, arguments.jsonl_keys)
    if arguments.tokenizer_type == "CharacterTokenizer":
        write_character_vocabulary(texts, output)
    elif arguments.tokenizer_type == "SPMTokenizer":
        write_sentencepiece(texts, arguments.vocab_size, arguments.model_type, output)
    else:
        write_byte_level_bpe(texts, arguments.vocab_size, output)
    print(f"wrote {output}: use it with tokenizer_type {arguments.tokenizer_type}, vocab_file {output}")


if __name__ == "__main__":
    sys.exit(main())
