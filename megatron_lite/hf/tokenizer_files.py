"""The tokenizer of a Hugging Face folder: which files it is in, and which of ours reads and writes them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_lite.data.tokenizers import END_OF_TEXT, Tokenizer, TokenizerKeys, load_tokenizer
from megatron_lite.data.tokenizers.huggingface import (
    HFTokenizer,
    named_token,
    read_library,
    read_tokenizer_config,
)
from megatron_lite.utils.errors import DataError

CONFIG = "tokenizer_config.json"
COPIED = (
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""All files that transformers writes about a tokenizer."""

MORE_TEMPLATES = "additional_chat_templates"
"""And the folder with chat templates that have names."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The keys that name a tokenizer, as :func:`megatron_lite.data.tokenizers.load_tokenizer` takes them."""

    tokenizer_type: str
    vocab_file: Path
    merge_file: Path | None = None
    begin: str | None = None
    """What goes before every text: then a tokenizer.json is made of the sentencepiece model, which adds no
    token by itself."""

    def moved_to(self, folder: Path) -> dict[str, str]:
        """The same keys for the files that :meth:`write` puts in ``folder``, as a run's YAML has them."""
        if self.begin is not None:
            return {"tokenizer_type": "HFTokenizer", "vocab_file": str(folder / "tokenizer.json")}
        keys = {"tokenizer_type": self.tokenizer_type, "vocab_file": str(folder / self.vocab_file.name)}
        return keys | ({"merge_file": str(folder / self.merge_file.name)} if self.merge_file else {})

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files into the new ``folder``.

        Raises:
            DataError: ``begin`` is given, and the sentencepiece model has no such token, or no tokenizer.json
                gives its ids.
        """
        folder.mkdir()
        if self.begin is not None:
            tokenizer = load_tokenizer(self)
            tokenizer.save_pretrained(folder)
            library, file = read_library(folder)
            token = self.begin, library.token_to_id(self.begin)
            if token[1] is None:
                raise DataError(
                    f"{self.vocab_file} has no {self.begin}, which {CONFIG} puts before every text "
                    "(add_bos_token, bos_token): correct one of them, or put a tokenizer.json there"
                )
            library.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{self.begin} $A", pair=f"{self.begin} $A {self.begin} $B", special_tokens=[token]
            )
            library.save(str(file))
        copy_tokenizer(self.vocab_file.parent, folder)


def find_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer in ``folder``: a tokenizer.json, else a sentencepiece model, else GPT-2's two files.

    Raises:
        DataError: there is none of them.
    """
    if (folder / "tokenizer.json").is_file():
        return TokenizerFiles("HFTokenizer", folder / "tokenizer.json")
    said = read_tokenizer_config(folder / CONFIG)
    plain = not said.get("add_eos_token") and _adds_only(folder, "</s>", {"<unk>", "<s>", "</s>"})
    if (folder / "tokenizer.model").is_file() and plain:
        begin = named_token(folder / CONFIG, "bos_token") or "<s>"
        return TokenizerFiles(
            "SPMTokenizer", folder / "tokenizer.model", begin=begin if said.get("add_bos_token") else None
        )
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file() and _is_gpt2(folder / CONFIG):
        return TokenizerFiles("GPT2BPETokenizer", vocab, merges)
    raise DataError(
        f"{folder} has no tokenizer that is read here: put its tokenizer.json there (transformers' "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
    )


def _is_gpt2(config: Path) -> bool:
    """Whether vocab.json and merges.txt are cut as GPT-2 cuts: others have such files too."""
    content = read_tokenizer_config(config)
    kind = content.get("tokenizer_class") or "GPT2Tokenizer"
    plain = kind.startswith("GPT2Tokenizer") and not content.get("add_bos_token")
    return plain and _adds_only(config.parent, END_OF_TEXT, {END_OF_TEXT})


def _adds_only(folder: Path, end: str, known: set[str]) -> bool:
    """Whether no file adds tokens to the vocabulary but ``known`` ones, and texts end by ``end``."""
    content = read_tokenizer_config(folder / CONFIG)
    added = {token["content"] for token in (content.get("added_tokens_decoder") or {}).values()}
    added |= set(read_tokenizer_config(folder / "added_tokens.json"))
    return added <= known and named_token(folder / CONFIG, "eos_token") in (None, end)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from ``source`` to the folder ``target``, which may be new."""
    target.mkdir(exist_ok=True)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)


def write_tokenizer(keys: TokenizerKeys, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write ``tokenizer``, loaded by ``keys``, into ``folder``; the ids that config.json names.

    Files that transformers made (a tokenizer.json with a tokenizer_config.json beside it) are copied: they
    have more than ids, such as the chat template and the token that begins a text.

    Raises:
        DataError: transformers cannot express the tokenizer.
    """
    file = None if keys.vocab_file is None else Path(keys.vocab_file)
    source = file.parent if file is not None and file.name == "tokenizer.json" else file
    if not isinstance(tokenizer, HFTokenizer) or not source or not (source / CONFIG).is_file():
        tokenizer.save_pretrained(folder)
        return {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}
    copy_tokenizer(source, folder)
    token = named_token(folder / CONFIG, "bos_token")
    begin = None if token is None else tokenizer.library.token_to_id(token)
    return {"bos_token_id": begin, "eos_token_id": tokenizer.eod_id}
