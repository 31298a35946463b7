"""Text files to Megatron's token files: what ``tools/preprocess_data.py`` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lite.data.encode import Encoded, EncodeSettings, encode_chunks
from megatron_lite.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from megatron_lite.data.inputs import find_inputs, read_chunks, texts_of
from megatron_lite.data.tokenizers import load_tokenizer
from megatron_lite.data.tokenizers.characters import write_character_vocabulary
from megatron_lite.utils.errors import DataError


@dataclass(frozen=True)
class Report:
    """What preprocessing made.

    Attributes:
        prefixes: key → prefix of its .bin/.idx pair.
        documents: documents in each of them.
        tokens: key → its tokens.
    """

    prefixes: dict[str, Path]
    documents: int
    tokens: dict[str, int]


def output_prefixes(prefix: Path, keys: Sequence[str]) -> dict[str, Path]:
    """key → ``PREFIX_key_document``.

    Raises:
        DataError: a file of that name exists.
    """
    prefixes = {key: prefix.with_name(f"{prefix.name}_{key}_document") for key in keys}
    for key_prefix in prefixes.values():
        for path in (bin_path(key_prefix), idx_path(key_prefix)):
            if path.exists():
                raise DataError(f"{path} exists: delete it or give another --output-prefix")
    return prefixes


def preprocess(
    inputs: Sequence[str],
    output_prefix: Path,
    settings: EncodeSettings,
    workers: int,
    log_interval: int = 100,
    num_docs: int | None = None,
) -> Report:
    """Encode every document of ``inputs`` into one ``.bin/.idx`` pair a key; the same for any ``workers``.

    Nothing is written under the final names unless all of it is.

    Args:
        inputs: files, folders, patterns (see :func:`find_inputs`).
        output_prefix: where to write, see :func:`output_prefixes`.
        settings: tokenizer and keys.
        workers: processes that encode.
        log_interval: documents between progress lines, at least (and at least half a second between them).
        num_docs: documents in the input, if known, for the time left; else it follows from the bytes read.

    Raises:
        DataError: the output exists, the input is bad or holds no text.
        OSError: e.g. the disk is full; the partial files are removed.
    """
    files = find_inputs(inputs)
    prefixes = output_prefixes(output_prefix, settings.keys)
    settings = with_character_vocabulary(files, output_prefix, settings)
    dtype = token_dtype(load_tokenizer(settings.tokenizer).vocab_size)
    progress = Progress(files, log_interval, num_docs)
    tokens = dict.fromkeys(settings.keys, 0)
    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(path, dtype)) for key, path in prefixes.items()}
        for encoded in encode_chunks(read_chunks(files), settings, workers):
            for key, (ids, lengths) in encoded.documents.items():
                writers[key].add_many(ids, lengths)
                tokens[key] += len(ids)
            progress.update(encoded)
        for key, count in tokens.items():
            if count == 0:
                raise DataError(f"the input holds no text under the key {key!r}: nothing is written")
        documents = writers[settings.keys[0]].document_count
    progress.finish()
    return Report(prefixes, documents, tokens)


def with_character_vocabulary(
    files: Sequence[Path], output_prefix: Path, settings: EncodeSettings
) -> EncodeSettings:
    """``settings``; if its tokenizer is of characters and has no vocabulary, with one of the input's.

    The vocabulary is written to the tokenizer's ``vocab_file``, or to ``PREFIX_vocab.json``.
    """
    source = settings.tokenizer
    if source.tokenizer_type != "CharacterTokenizer":
        return settings
    path = Path(source.vocab_file or output_prefix.with_name(f"{output_prefix.name}_vocab.json"))
    if not path.exists():
        records = (texts_of(chunk, settings.keys) for chunk in read_chunks(files))
        size = write_character_vocabulary(
            (text for by_key in records for texts in by_key.values() for text in texts), path
        )
        print(f"wrote {path}: {size} ids", file=sys.stderr)
    return replace(settings, tokenizer=replace(source, vocab_file=str(path)))


class Progress:
    """Rate and time left on standard error: a line rewritten on a terminal, else one every ten seconds."""

    def __init__(self, files: Sequence[Path], log_interval: int, num_docs: int | None) -> None:
        self._sizes = {path: path.stat().st_size for path in files}
        self._total = sum(self._sizes[path] for path in files)
        self._log_interval = log_interval
        self._num_docs = num_docs
        self._terminal = sys.stderr.isatty()
        self._start = self._last_time = time.monotonic()
        self._documents = self._last_documents = self._tokens = 0
        self._done_files = 0
        self._file: Path | None = None
        self._position = 0

    def update(self, encoded: Encoded) -> None:
        """Count a chunk; print if it is time."""
        if self._file is not None and encoded.path != self._file:
            self._done_files += self._sizes[self._file]
        self._file, self._position = encoded.path, encoded.position
        self._documents += max(len(lengths) for _, lengths in encoded.documents.values())
        self._tokens += sum(len(ids) for ids, _ in encoded.documents.values())
        now = time.monotonic()
        due = now - self._last_time >= (0.5 if self._terminal else 10)
        if due and self._documents - self._last_documents >= self._log_interval:
            self._last_time, self._last_documents = now, self._documents
            self._print(now - self._start)

    def _print(self, seconds: float) -> None:
        if self._num_docs:
            done = min(1.0, self._documents / self._num_docs)
        else:
            done = min(1.0, (self._done_files + self._position) / max(1, self._total))
        left = seconds / done - seconds if done else 0.0
        line = f"{self._rates(seconds)}, {done:.0%}, {left:.0f} s left"
        print(
            f"\r{line:<100}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def _rates(self, seconds: float) -> str:
        return (
            f"{self._documents:,} documents, {self._tokens:,} tokens, "
            f"{self._total and (self._done_files + self._position) / seconds / 1e6:.1f} MB/s, "
            f"{self._tokens / seconds / 1e6:.2f} M tokens/s"
        )

    def finish(self) -> None:
        """Print the totals."""
        seconds = max(1e-9, time.monotonic() - self._start)
        line = f"{self._rates(seconds)}, {seconds:.1f} s"
        print(f"\r{line:<100}" if self._terminal else line, file=sys.stderr, flush=True)
