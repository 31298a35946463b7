"""A whole run: inputs to ``.bin/.idx`` pairs with their side files."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lite.data.indexed import HEADER, bin_path, idx_path
from megatron_lite.data.preprocessing.answers import AnswerEncoder
from megatron_lite.data.preprocessing.encode import Encoder, EncodeSettings
from megatron_lite.data.preprocessing.facts import facts_path, read_facts
from megatron_lite.data.preprocessing.journal import Journal, KeyTotals, Totals
from megatron_lite.data.preprocessing.progress import Progress
from megatron_lite.data.preprocessing.records import describe, read_texts
from megatron_lite.data.preprocessing.sources import TASK_BYTES, Source, Task, find_sources
from megatron_lite.data.preprocessing.workers import Counted, Workers
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lite.data.tokenizers.characters import write_character_vocabulary
from megatron_lite.utils.errors import DataError

REVISION = 1
"""To be raised when the same text would be written differently: old unfinished runs then do not continue."""

INDEX_BYTES = 20
"""Bytes of an index for each document: length, offset, boundary."""


@dataclass(frozen=True)
class Report:
    """What preprocessing made.

    Attributes:
        prefixes: key → prefix of its files.
        totals: counts, see :class:`Totals`.
        seconds: wall clock of this run.
        was_there: whether the same command had made the files before, so that nothing was done.
    """

    prefixes: dict[str, Path]
    totals: Totals
    seconds: float
    was_there: bool = False

    @property
    def documents(self) -> int:
        """Documents of the first key."""
        return next(iter(self.totals.keys.values())).documents

    @property
    def tokens(self) -> dict[str, int]:
        """key → its tokens."""
        return {key: totals.tokens for key, totals in self.totals.keys.items()}


def preprocess(
    inputs: Sequence[str],
    output_prefix: Path,
    settings: EncodeSettings,
    workers: int,
    log_interval: int = 100,
    num_docs: int | None = None,
    on_error: str = "stop",
) -> Report:
    """Encode every document of ``inputs`` into one ``.bin/.idx`` pair a key; the same for any ``workers``.

    Nothing is written under the final names unless all of it is. A run that is killed leaves
    ``PREFIX.partial/``, and the same call continues it.

    Args:
        inputs: files, folders, patterns, ``-``, ``hf:NAME`` (see :func:`find_sources`).
        output_prefix: where to write: ``PREFIX_key_document``.
        settings: tokenizer, keys and what becomes of a text.
        workers: processes that encode.
        log_interval: documents between progress lines, at least.
        num_docs: documents in the input, if known, for the time left; else it follows from the bytes read.
        on_error: ``stop`` at a bad record, or ``skip`` it; each is counted and told.

    Raises:
        DataError: other files have the output's name, the input is bad or holds no text.
        OSError: e.g. the disk is full; the same call continues.
    """
    start = time.monotonic()
    sources = find_sources(inputs, settings.separator)
    prefixes = {key: output_prefix.with_name(f"{output_prefix.name}_{key}_document") for key in settings.keys}
    settings = with_character_vocabulary(inputs, output_prefix, settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    identity = digest_of(settings, sources, tokenizer)
    folder = output_prefix.with_name(f"{output_prefix.name}.partial")
    if not folder.is_dir():
        was_there = existing_totals(prefixes, identity)
        if was_there is not None:
            return Report(prefixes, was_there, time.monotonic() - start, was_there=True)
    encoder = (AnswerEncoder if settings.text.conversation else Encoder)(settings, tokenizer)
    start_over = not all(source.can_be_read_again for source in sources)
    journal = Journal(folder, identity, prefixes, encoder.dtype, start_over)
    try:
        if not journal.finished:
            run = Run(
                sources,
                settings,
                journal,
                Reporter(sources, on_error, log_interval, num_docs, journal.totals),
            )
            with warmed(tokenizer, settings.reference):
                run.encode(encoder, workers)
            journal.finish(facts_of(sources, settings, tokenizer, journal.totals, identity))
        journal.publish()
    except BaseException:
        if journal.totals.chunk < 0 and not journal.finished:
            journal.remove()
        raise
    finally:
        journal.close()
    made = existing_totals(prefixes, identity)
    assert made is not None
    return Report(prefixes, made, time.monotonic() - start)


def digest_of(settings: EncodeSettings, sources: Sequence[Source], tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits of all that the output depends on."""
    files = [
        [source.name, [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]]
        for source in sources
    ]
    content = [REVISION, TASK_BYTES, asdict(settings), tokenizer.fingerprint, files]
    return xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()


def existing_totals(prefixes: dict[str, Path], identity: str) -> Totals | None:
    """The totals of the output if the run ``identity`` has made all of it; None if there is none of it.

    Raises:
        DataError: there are other files of these names.
    """
    totals = Totals()
    for key, prefix in prefixes.items():
        present = [path for path in (bin_path(prefix), idx_path(prefix), facts_path(prefix)) if path.exists()]
        if not present and not totals.keys:
            continue
        facts = read_facts(prefix) or {}
        if len(present) < 3 or facts.get("run") != identity or len(totals.keys) != list(prefixes).index(key):
            raise DataError(
                f"{(present or [prefix])[0]} exists and is of another run: delete it or give another "
                "--output-prefix"
            )
        totals.records, totals.bad, totals.dropped = (facts[name] for name in ("records", "bad", "dropped"))
        totals.keys[key] = KeyTotals(**{name: facts[name] for name in asdict(KeyTotals())})
    return totals if totals.keys else None


def facts_of(
    sources: Sequence[Source], settings: EncodeSettings, tokenizer: Tokenizer, totals: Totals, identity: str
) -> dict[str, dict[str, Any]]:
    """key → what its side file says, but for the checksums.

    Raises:
        DataError: a key has no token.
    """
    files = [path for source in sources for path in source.files]
    common = {
        "run": identity,
        "records": totals.records,
        "bad": totals.bad,
        "dropped": totals.dropped,
        "tokenizer": {
            **asdict(settings.tokenizer),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "settings": {name: value for name, value in asdict(settings).items() if name != "tokenizer"},
        "sources": [{"file": str(path), "bytes": path.stat().st_size} for path in files]
        + [{"name": source.name} for source in sources if not source.files],
    }
    for key, counts in totals.keys.items():
        if counts.tokens == 0:
            totals.chunk = -1  # nothing worth keeping
            raise DataError(f"the input holds no text under the key {key!r}: nothing is written")
    return {key: {"key": key, **asdict(counts), **common} for key, counts in totals.keys.items()}


@contextmanager
def warmed(tokenizer: Tokenizer, reference: bool) -> Iterator[None]:
    """``tokenizer`` with all that it makes at first use, so that forked workers share it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer.encode_arrays([""], reference)
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class Run:
    """The encoding of ``sources`` from where ``journal`` stands."""

    def __init__(
        self, sources: Sequence[Source], settings: EncodeSettings, journal: Journal, reporter: Reporter
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._journal = journal
        self._reporter = reporter

    def encode(self, encoder: Encoder, workers: int) -> None:
        """Encode all tasks that are left. Raises as :func:`preprocess`."""
        journal, totals = self._journal, self._journal.totals
        before = {key: (counts.tokens, counts.documents) for key, counts in totals.keys.items()}
        with Workers(workers, encoder, journal.outputs, [journal.descriptor]) as processes:
            for task, counted in processes.run(self._tasks(), before):
                if task.place != totals.place:
                    totals.place, totals.lines = task.place, 0
                self._reporter.bad_records(counted, task.place, totals.lines)
                totals.source, totals.chunk = task.source, task.chunk
                totals.position = self._reporter.starts[task.source] + task.position
                totals.add(counted)
                journal.commit()
                self._reporter.progress(totals, encoder.dtype, journal)
        self._reporter.done(totals)

    def _tasks(self) -> Iterator[Task]:
        done = self._journal.totals
        first_source, first_chunk = done.source, done.chunk + 1
        for source in self._sources[first_source:]:
            yield from source.tasks(first_chunk if source.index == first_source else 0)


class Reporter:
    """What a person is told while it runs, on standard error."""

    def __init__(
        self,
        sources: Sequence[Source],
        on_error: str,
        log_interval: int,
        num_docs: int | None,
        done: Totals,
    ) -> None:
        sizes = [source.size for source in sources]
        self._total = sum(sizes) if all(source.files for source in sources) else 0
        self.starts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        self._on_error = on_error
        self._progress = Progress(
            self._total, num_docs, log_interval, (done.position, done.records, done.tokens)
        )
        self._estimated = False
        if done.chunk >= 0:
            self._progress.say(f"continuing after {done.records:,} documents, {done.tokens:,} tokens")

    def bad_records(self, counted: Counted, place: str, lines: int) -> None:
        """Tell of a task's broken records. Raises DataError for the first one if they are to stop the run."""
        if counted.bad and self._on_error == "stop":
            raise DataError(
                f"{describe(counted.bad[0], place, lines + 1)}; or skip such with --on-error skip"
            )
        for bad in counted.bad:
            self._progress.say(f"skipped: {describe(bad, place, lines + 1)}")
        if counted.bad_count > len(counted.bad):
            self._progress.say(f"skipped: {counted.bad_count - len(counted.bad):,} more after it in {place}")

    def progress(self, totals: Totals, dtype: np.dtype, journal: Journal) -> None:
        """Tell the size to expect, once; then progress."""
        if not self._estimated:
            self._estimated = True
            self._estimate(totals, dtype, journal.folder)
        self._progress.update(totals.position, totals.records, totals.tokens)

    def _estimate(self, totals: Totals, dtype: np.dtype, folder: Path) -> None:
        """From the first task: the disk that all will take. Raises DataError if there is not so much."""
        if not self._total or not totals.position:
            return
        documents = sum(counts.documents for counts in totals.keys.values())
        done = totals.tokens * dtype.itemsize + documents * INDEX_BYTES + HEADER.size
        whole = int(done * self._total / totals.position)
        free = shutil.disk_usage(folder).free
        self._progress.say(
            f"{self._total / 1e6:,.1f} MB of input will take about {whole / 1e6:,.1f} MB of disk "
            f"({free / 1e6:,.0f} MB are free)"
        )
        if whole - done > free:
            raise DataError(
                f"the output will take about {whole / 1e9:.1f} GB and {folder.parent} has "
                f"{free / 1e9:.1f} GB free: make room or give another --output-prefix"
            )

    def done(self, totals: Totals) -> None:
        """The last line."""
        self._progress.say(self._progress.rates(totals.position, totals.records, totals.tokens))


def with_character_vocabulary(
    inputs: Sequence[str], output_prefix: Path, settings: EncodeSettings
) -> EncodeSettings:
    """``settings``; if its tokenizer is of characters and has no vocabulary, with one of the input's.

    The vocabulary is written to the tokenizer's ``vocab_file``, or to ``PREFIX_vocab.json``.
    """
    source = settings.tokenizer
    if source.tokenizer_type != "CharacterTokenizer":
        return settings
    path = Path(source.vocab_file or output_prefix.with_name(f"{output_prefix.name}_vocab.json"))
    if not path.exists():
        size = write_character_vocabulary(read_texts(inputs, settings.keys), path)
        print(f"wrote {path}: {size} ids", file=sys.stderr)
    return replace(settings, tokenizer=replace(source, vocab_file=str(path)))
