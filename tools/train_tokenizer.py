"""Make a vocabulary from text: ``train_tokenizer.py --input text.jsonl --output tokenizer.json``.

HFTokenizer: byte-level BPE or unigram as a tokenizer.json. SPMTokenizer: a sentencepiece model, BPE or
unigram. Either with ``--jieba``: on Chinese words, to be used as JiebaTokenizer. CharacterTokenizer: a JSON
file of the characters. Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.data.preprocessing.records import read_texts
from megatron_lite.data.tokenizers import END_OF_TEXT, PADDING
from megatron_lite.data.tokenizers.characters import write_character_vocabulary
from megatron_lite.data.vocabulary import write_byte_level, write_sentencepiece
from megatron_lite.utils.errors import DataError, command_line

ENDINGS = {"HFTokenizer": ".json", "SPMTokenizer": ".model", "CharacterTokenizer": ".json"}
"""Tokenizer type → ending of its file."""


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
        choices=list(ENDINGS),
        default="HFTokenizer",
    )
    parser.add_argument(
        "--model-type", choices=["bpe", "unigram"], default="bpe", help="how words are cut (default: bpe)"
    )
    parser.add_argument(
        "--jieba", action="store_true", help="cut Chinese into words first, as CPM and Chinese GPT-3 do"
    )
    parser.add_argument(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help=f"more special tokens, besides {END_OF_TEXT} and {PADDING}",
    )
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
    ending = ENDINGS[arguments.tokenizer_type]
    if output.suffix != ending:
        raise DataError(f"--output {output}: the file of a {arguments.tokenizer_type} ends in {ending}")
    texts = read_texts(arguments.input, arguments.jsonl_keys)
    kind = arguments.tokenizer_type
    if kind == "CharacterTokenizer":
        if arguments.jieba or arguments.special_tokens:
            raise DataError("--jieba and --special-tokens are not for a CharacterTokenizer: leave them out")
        write_character_vocabulary(texts, output)
    else:
        write = write_sentencepiece if kind == "SPMTokenizer" else write_byte_level
        specials, jieba = arguments.special_tokens, arguments.jieba
        write(texts, arguments.vocab_size, arguments.model_type, output, specials, jieba)
        kind = "JiebaTokenizer" if jieba else kind
    print(f"wrote {output}: use it with tokenizer_type {kind}, vocab_file {output}")


if __name__ == "__main__":
    sys.exit(main())
