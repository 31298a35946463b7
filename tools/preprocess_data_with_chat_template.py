"""Turn prompts with answers, or chats, into token files of which only the answers are learned.

Reads records with ``messages`` or ``conversation`` (role and content), ``prompt`` and ``completion``, or
``src_txt`` and ``tgt_txt``.
Writes ``PREFIX_text_document`` and ``PREFIX_label_document`` (``.bin``, ``.idx``, ``.json``), to be named in
``train_data_paths`` and ``train_label_data_paths``. Takes the flags of GPT-NeoX's script of this name, but
for ``--for-rm`` (reward models are not trained here); with ``--jsonl-keys`` files are called as there,
``PREFIX_KEY_document`` and ``PREFIX_KEY_label_document``. A run that was killed continues when the same
command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_lite.data.preprocessing.answers import OUTPUTS, outputs_of
from megatron_lite.data.preprocessing.conversations import ConversationSettings, template_beside
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.data.preprocessing.transforms import TextSettings
from megatron_lite.data.tokenizers import REGISTRY
from megatron_lite.utils.errors import DataError, command_line


def add_records(parser: argparse.ArgumentParser) -> None:
    """Options of what is read and learned."""
    records = parser.add_argument_group("records")
    records.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, patterns, as tools/preprocess_data.py takes them (JSON, Parquet, Arrow)",
    )
    records.add_argument(
        "--jsonl-keys",
        nargs="+",
        metavar="KEY",
        help="keys of chats; each makes files of its own, KEY and KEY_label in place of text and label "
        "(default: messages or conversation)",
    )
    records.add_argument(
        "--prompt-key",
        nargs="+",
        metavar="KEY",
        help="key of the prompt, in place of prompt and src_txt; of several, those with text are joined by a "
        "newline",
    )
    records.add_argument("--answer-key", metavar="KEY", help="key of the answer, with --prompt-key")
    records.add_argument(
        "--separator", default="", help="text between prompt and answer (\\n as in Python), learned with it"
    )
    records.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template (default: the tokenizer's own); also for prompts, as a chat of one turn",
    )
    records.add_argument(
        "--no-chat-template", action="store_true", help="join prompts and answers as they are"
    )
    records.add_argument("--generation-role", default="assistant", help="who answers (default: assistant)")
    records.add_argument("--only-last", action="store_true", help="learn only the last answer of a chat")
    records.add_argument("--no-mask", action="store_true", help="learn prompts, too")
    records.add_argument("--ftfy", action="store_true", help="mend wrongly decoded text (slow)")
    records.add_argument("--num-docs", type=int, help="records in the input, if known, for the time left")
    records.add_argument(
        "--filter", metavar="CONDITION", help="take only records with KEY, KEY=VALUE, KEY>=NUMBER …"
    )
    records.add_argument(
        "--on-error", choices=["stop", "skip"], default="stop", help="what a bad record does (default: stop)"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_records(parser)
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", default="HFTokenizer", help=", ".join(REGISTRY))
    tokens.add_argument(
        "--vocab-file", "--tokenizer-path", dest="vocab_file", help="vocabulary, or a tokenizer's folder"
    )
    tokens.add_argument("--merge-file", help="GPT-2's merges.txt")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix", type=Path, required=True, help="outputs, without _text_document.bin"
    )
    output.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="the one format there is")
    runtime = parser.add_argument_group("runtime")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runtime.add_argument("--workers", type=int, default=cores, help=f"processes (default: all, {cores})")
    runtime.add_argument("--log-interval", type=int, default=100, help="records between progress lines")
    return parser.parse_args()


def conversation_of(arguments: argparse.Namespace, keys: tuple[str, ...]) -> ConversationSettings:
    """How the command line wants records to be read, with chats under the first of ``keys`` there is."""
    template, variables = template_beside(arguments.vocab_file)
    if arguments.chat_template:
        path = Path(arguments.chat_template)
        if not path.is_file():
            raise DataError(f"there is no file {path}: correct --chat-template")
        template = path.read_text(encoding="utf-8")
    forms = ConversationSettings.forms
    if (arguments.prompt_key is None) != (arguments.answer_key is None):
        raise DataError("--prompt-key and --answer-key go together: give both")
    if arguments.prompt_key:
        forms = ((tuple(arguments.prompt_key), arguments.answer_key),)
    return ConversationSettings(
        keys,
        forms,
        arguments.separator.encode("latin-1", "backslashreplace").decode("unicode_escape"),
        None if arguments.no_chat_template else template,
        variables,
        arguments.generation_role,
        arguments.only_last,
        arguments.no_mask,
    )


def encode(arguments: argparse.Namespace, keys: tuple[str, ...], outputs: tuple[str, str]) -> None:
    """Make the two ``outputs`` of the input, with chats under the first of ``keys`` there is."""
    settings = EncodeSettings(
        TokenizerSource(arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file),
        keys=outputs,
        text=TextSettings(
            ftfy=arguments.ftfy, filter=arguments.filter, conversation=conversation_of(arguments, keys)
        ),
    )
    report = preprocess(
        arguments.input,
        arguments.output_prefix,
        settings,
        workers=arguments.workers,
        log_interval=arguments.log_interval,
        num_docs=arguments.num_docs,
        on_error=arguments.on_error,
    )
    text, label = (report.prefixes[key] for key in outputs)
    print(f"{report.documents:,} conversations, {report.tokens[outputs[0]]:,} tokens")
    print(f"train_data_paths: [{text}]\ntrain_label_data_paths: [{label}]")


@command_line
def main() -> None:
    """Encode the input."""
    arguments = parse_arguments()
    if arguments.jsonl_keys is None:
        encode(arguments, ConversationSettings.messages, OUTPUTS)
    for key in arguments.jsonl_keys or []:
        encode(arguments, (key,), outputs_of(key))


if __name__ == "__main__":
    sys.exit(main())
