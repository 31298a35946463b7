"""The texts of a task, by key. A record that is bad is kept apart with its place and the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_lite.data.preprocessing.sources import Task, decompressed, find_sources, read_whole
from megatron_lite.data.preprocessing.streams import damage_named
from megatron_lite.data.preprocessing.transforms import BadRecord, Predicate, TextSettings, transformed
from megatron_lite.utils.errors import DataError

PARAGRAPHS = "\n\n"
"""Joins a text that is a list of paragraphs, as lm_dataformat's archives may have them."""

EMPTY_FILE = "the file is empty: leave it out"


@dataclass(frozen=True)
class Bad:
    """A record that is left out because it is broken.

    Attributes:
        line: its number in the task, from 0; None when ``place`` says all.
        word: what is numbered: line, document, row.
        place: its file, if that is not the task's ``place``.
        reason: what is wrong with it, and what to do.
    """

    line: int | None
    word: str
    place: str
    reason: str


@dataclass
class Records:
    """Texts of consecutive records: ``texts[key][i]`` for the i-th record that is left.

    Attributes:
        texts: key → texts; all of one length.
        lines: records (or lines, if blank) read, whatever became of them.
        bad: those that are broken.
        dropped: those that a setting leaves out.
    """

    texts: dict[str, list[str]]
    lines: int
    bad: list[Bad] = field(default_factory=list)
    dropped: int = 0


def read_records(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """The texts of ``task`` under each of ``keys``, after the steps that ``settings`` ask for.

    Raises:
        DataError: a file cannot be read at all (damaged, not of its format).
    """
    for records in KINDS[task.kind](task, keys, settings):
        if settings.changes_text and settings.conversation is None:
            records = transformed_records(records, settings)
        yield records


def transformed_records(records: Records, settings: TextSettings) -> Records:
    """``records`` with mended text, without those that are too short under any key."""
    columns = {key: [transformed(text, settings) for text in texts] for key, texts in records.texts.items()}
    if settings.min_length:
        kept = [
            all(len(text) >= settings.min_length for text in row)
            for row in zip(*columns.values(), strict=True)
        ]
        records.dropped += len(kept) - sum(kept)
        columns = {
            key: [text for text, keep in zip(texts, kept, strict=True) if keep]
            for key, texts in columns.items()
        }
    records.texts = columns
    return records


def json_lines(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """Lines of JSON, an object each (or a bare string: a text); blank lines are skipped."""
    block = task.payload if task.payload is not None else read_lines(task.place, task.start, task.end)
    assert isinstance(block, bytes)
    lines = block.split(b"\n")
    del block
    if not lines[-1]:
        lines.pop()
    if settings.filter is None and settings.conversation is None:
        try:
            found = [orjson.loads(line) for line in lines]
            texts = {key: [record[key] for record in found] for key in keys}
        except (ValueError, KeyError, TypeError, IndexError):
            pass  # something is unusual: one by one then
        else:
            if all(set(map(type, column)) <= {str} for column in texts.values()):
                yield Records(texts, len(lines))
                return
    yield one_by_one(lines, keys, settings, "line", lambda line: parse_line(line, settings))


def parse_line(line: bytes, settings: TextSettings) -> Any:
    """The JSON value in ``line``; None for a blank one."""
    if not line.strip():
        return None
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if settings.replace_invalid:
            try:
                return orjson.loads(line.decode(errors="replace"))
            except orjson.JSONDecodeError:
                pass
        raise BadRecord(f"not valid JSON ({error}): correct or delete the line") from None


def read_lines(path: str, start: int, end: int) -> bytes:
    """The lines of ``path`` that begin in bytes ``start`` to ``end``, whole."""
    with open(path, "rb") as file:
        if start:
            # The line that runs into the range belongs to the range in which it begins.
            file.seek(start - 1)
            block = file.read(end - start + 1)
            cut = block.find(b"\n") + 1
            if not cut:
                return b""
            block = block[cut:]
        else:
            block = file.read(end)
        if not block or block.endswith(b"\n"):
            return block
        parts = [block]
        while block := file.read(1 << 20):
            cut = block.find(b"\n") + 1
            parts.append(block[:cut] if cut else block)
            if cut:
                break
        return b"".join(parts)


def one_by_one(
    items: Sequence[Any],
    keys: Sequence[str],
    settings: TextSettings,
    word: str,
    parse: Callable[[Any], Any],
    places: Sequence[str] | None = None,
) -> Records:
    """Records of ``items``, each parsed and checked alone. ``places``: their files, if each has its own."""
    records = Records({key: [] for key in keys}, len(items))
    keep = Predicate(settings.filter) if settings.filter else None
    for index, item in enumerate(items):
        try:
            record = parse(item)
            if record is None:
                continue
            row = (
                texts_of(record, keys) if settings.conversation is None else [segments_json(record, settings)]
            )
            if keep is not None and not keep(record):
                records.dropped += 1
                continue
        except BadRecord as error:
            place = places[index] if places else ""
            records.bad.append(Bad(None if places else index, word, place, str(error)))
            continue
        for key, text in zip(keys, row, strict=True):
            records.texts[key].append(text)
    return records


def segments_json(record: Any, settings: TextSettings) -> str:
    """The segments of ``record``, each with its text mended, as JSON. Raises BadRecord when it is no
    conversation."""
    from megatron_lite.data.preprocessing.conversations import segments_of

    assert settings.conversation is not None
    segments = segments_of(record, settings.conversation)
    return orjson.dumps([(transformed(text, settings), learned) for text, learned in segments]).decode()


def texts_of(record: Any, keys: Sequence[str]) -> list[str]:
    """The text under each of ``keys``. Raises BadRecord when one is missing or no text."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but {type(record).__name__}: write one object a line")
    texts = []
    for key in keys:
        text = value_at(record, key)
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = PARAGRAPHS.join(text)
        if not isinstance(text, str):
            raise BadRecord(
                f"there is no text under the key {key!r} (keys: {', '.join(record)}): correct "
                "--jsonl-keys or the input"
            )
        texts.append(text)
    return texts


def value_at(record: dict[str, Any], key: str) -> Any:
    """What ``record`` has under ``key``, else under its parts divided by dots; None if nothing."""
    if key in record or "." not in key:
        return record.get(key)
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def json_array(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """A file that is one JSON array of objects or strings: in memory as a whole."""
    with open(task.place, "rb") as file, damage_named(task.place, os.path.splitext(task.place)[1]):
        content = read_whole(decompressed(file, task.place))
    try:
        items = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        first, _, rest = content.partition(b"\n")
        if rest.strip():
            # not one array: lines, of which the first happens to begin with a bracket
            lines = [first, *rest.split(b"\n")]
            yield one_by_one(lines, keys, settings, "line", lambda line: parse_line(line, settings))
            return
        raise DataError(f"{task.place}: not valid JSON ({error}): correct the file") from None
    yield one_by_one(items, keys, settings, "element", lambda item: item)


def documents(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """Documents that the parent has read."""
    assert isinstance(task.payload, list)
    yield one_by_one(task.payload, keys, settings, "document", lambda item: {"text": decode(item, settings)})


def text_files(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """Files that are a document each."""
    contents = []
    for path in task.files:
        with open(path, "rb") as file, damage_named(str(path), path.suffix):
            contents.append(read_whole(decompressed(file, path.name)))
    places = [str(path) for path in task.files]
    yield one_by_one(contents, keys, settings, "file", lambda item: file_text(item, settings), places)


def empty(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """A file of no bytes."""
    yield Records({key: [] for key in keys}, 0, [Bad(None, "file", task.place, EMPTY_FILE)])


def file_text(content: bytes, settings: TextSettings) -> dict[str, str]:
    """The record of a text file."""
    if not content:
        raise BadRecord(EMPTY_FILE)
    return {"text": decode(content, settings)}


def decode(text: bytes, settings: TextSettings) -> str:
    """``text`` as UTF-8."""
    try:
        return text.decode(errors="replace" if settings.replace_invalid else "strict")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 text (byte {error.start}): convert it or leave it out") from None


def parquet(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """A row group."""
    from megatron_lite.data.preprocessing.tables import parquet_rows

    for rows in parquet_rows(task.place, task.start, needed(keys, settings)):
        yield one_by_one(rows, keys, settings, "row", lambda row: row)


def arrow(task: Task, keys: Sequence[str], settings: TextSettings) -> Iterator[Records]:
    """Record batches."""
    from megatron_lite.data.preprocessing.tables import arrow_rows

    for rows in arrow_rows(task.place, task.start, task.end, needed(keys, settings)):
        yield one_by_one(rows, keys, settings, "row", lambda row: row)


def needed(keys: Sequence[str], settings: TextSettings) -> list[str]:
    """The keys that are read of each record."""
    wanted = list(keys) if settings.conversation is None else settings.conversation.columns
    return [*wanted, Predicate(settings.filter).key] if settings.filter else wanted


KINDS: dict[str, Callable[[Task, Sequence[str], TextSettings], Iterator[Records]]] = {
    "lines": json_lines,
    "array": json_array,
    "documents": documents,
    "files": text_files,
    "parquet": parquet,
    "arrow": arrow,
    "empty": empty,
}
"""Kind of task → how its records are read."""


def read_texts(inputs: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    """The texts of ``inputs`` (as :func:`find_sources` takes them) under each of ``keys``, in order.

    Raises:
        DataError: an input is missing, damaged, or has a bad record.
    """
    for source in find_sources(inputs):
        place, line = "", 1
        for task in source.tasks():
            if task.place != place:
                place, line = task.place, 1
            for records in read_records(task, keys, TextSettings()):
                if records.bad:
                    raise DataError(describe(records.bad[0], place, line))
                line += records.lines
                for texts in records.texts.values():
                    yield from texts


def describe(bad: Bad, place: str, first_line: int) -> str:
    """One sentence about ``bad``, which is in ``place``, whose task begins with line ``first_line``."""
    where = bad.place or f"{place}, {bad.word} {first_line + (bad.line or 0)}"
    return f"{where}: {bad.reason}"
