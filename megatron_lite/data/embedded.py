"""The text that every machine has: the source of the running Python's own standard library.

A run that names no data trains on it. Real text of about 30 MB, tokenised once into a cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megatron_lite.data.tokenizers import END_OF_TEXT, Tokenizer
from megatron_lite.data.tokenizers.huggingface import HFTokenizer
from megatron_lite.data.vocabulary import train_byte_level
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import fsync_directory, locked
from megatron_lite.utils.log import LOGGER

VOCAB_SIZE = 8192
"""Ids of the BPE that is trained on the text, ``<|endoftext|>`` among them."""

REVISION = 1
"""To be raised when the same text would be written differently: old caches are then left alone."""

TRAINING_STRIDE = 4
"""The BPE is trained on every fourth file: a fourth of the time, 2 % more tokens."""

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
"""Folders of the library that are not the library."""


@dataclass(frozen=True)
class EmbeddedData:
    """Where the tokenised text lies.

    Attributes:
        prefix: of the .bin/.idx pair.
        tokenizer_file: tokenizer.json of the BPE; None when another tokenizer was given.
    """

    prefix: Path
    tokenizer_file: Path | None


def embedded_data(
    cache: Path, vocab_size: int = VOCAB_SIZE, tokenizer: Tokenizer | None = None
) -> EmbeddedData:
    """The standard library's source as tokens, by ``tokenizer`` or by a BPE of ``vocab_size`` trained on it.

    Built on first use in a folder of ``cache`` that is named after the Python version, the text and the
    tokenizer; processes that race for it wait for one of them. Later uses read and hash the text (0.3 s).

    Raises:
        DataError: this Python has no source of its standard library.
        OSError: the cache cannot be written, e.g. a full disk; nothing is left behind.
    """
    documents = read_standard_library()
    version = platform.python_version()
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{REVISION} {tokenizer.fingerprint if tokenizer else vocab_size}".encode())
    for document in documents:
        digest.update(document)
        digest.update(b"\0")
    folder = cache / f"python-{version}-{digest.hexdigest()}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"):
        if not folder.is_dir():
            build(folder, [document.decode() for document in documents], vocab_size, tokenizer)
    data = EmbeddedData(folder / "text_document", None if tokenizer else folder / "tokenizer.json")
    LOGGER.info(
        "no data named: using the source of Python %s's standard library (%d files, %.1f MB, %.1f M tokens), "
        "tokenised in %s",
        version,
        len(documents),
        sum(map(len, documents)) / 1e6,
        len(IndexedDataset(data.prefix).tokens) / 1e6,
        folder,
    )
    return data


def read_standard_library() -> list[bytes]:
    """The ``.py`` files in UTF-8, ordered by the hash of their paths: any stretch is a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    by_hash: dict[bytes, bytes] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            if path.suffix != ".py":
                continue
            content = path.read_bytes()
            if content and is_utf8(content):
                by_hash[hashlib.blake2b(path.relative_to(root).as_posix().encode()).digest()] = content
    if not by_hash:
        raise DataError(
            f"no data is named, and this Python has no source in {root}: give "
            "data_path, vocab_file and tokenizer_type"
        )
    return [content for _, content in sorted(by_hash.items())]


def is_utf8(content: bytes) -> bool:
    """Whether ``content`` is UTF-8 (some files that test Python's parser are not)."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def build(folder: Path, texts: list[str], vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Write the token files (and the BPE) into ``folder``, whole or not at all."""
    LOGGER.info("preparing the embedded data in %s: once, some seconds", folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process's; whoever builds holds the lock
    temporary.mkdir()
    try:
        if tokenizer is None:
            library = train_byte_level(texts[::TRAINING_STRIDE], vocab_size, specials=[END_OF_TEXT])
            library.save(str(temporary / "tokenizer.json"))
            tokenizer = HFTokenizer(library, END_OF_TEXT)
        with IndexedWriter(temporary / "text_document", token_dtype(tokenizer.vocab_size)) as writer:
            writer.add_many(*tokenizer.encode_arrays(texts, ended=True))
        os.rename(temporary, folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
