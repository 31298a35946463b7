"""Parquet and Arrow files and data sets of the datasets library: what needs libraries that start slowly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_lite.utils.errors import DataError

BATCH_ROWS = 4096
"""Rows of a Parquet row group that are in memory as Python objects at once."""


def row_groups(path: Path) -> int:
    """Number of row groups in a Parquet file."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.metadata.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}): copy it again") from None


def parquet_rows(path: str, group: int, keys: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of one row group with the columns that ``keys`` need, in batches.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            names = columns_for(file.schema_arrow.names, keys)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                batch.validate(full=True)
                yield batch.to_pylist() if names else [{}] * batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}, row group {group}: damaged Parquet ({error}): copy it again") from None


def arrow_ranges(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Record batches of an Arrow file in groups of ``size`` bytes: (first, end, bytes read)."""
    start = index = length = total = 0
    for batch in arrow_batches(path):
        index += 1
        length += batch.nbytes
        if length >= size:
            total += length
            yield start, index, total
            start, length = index, 0
    if index > start:
        yield start, index, total + length


def arrow_batches(path: Path | str, start: int = 0, end: int | None = None) -> Iterator[Any]:
    """Record batches ``start`` to ``end`` of an Arrow file of either kind (random access, or a stream as the
    datasets library writes), memory-mapped.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_file(file)
                yield from map(
                    reader.get_batch,
                    range(start, reader.num_record_batches if end is None else end),
                )
            except pyarrow.ArrowInvalid:
                file.seek(0)
                for index, batch in enumerate(pyarrow.ipc.open_stream(file)):
                    if end is not None and index >= end:
                        break
                    if index >= start:
                        yield batch
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Arrow file ({error}): copy it again") from None


def arrow_rows(path: str, start: int, end: int, keys: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of record batches ``start`` to ``end`` with the columns that ``keys`` need.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow

    for batch in arrow_batches(path, start, end):
        names = columns_for(batch.schema.names, keys)
        try:
            # Damaged offsets would crash the interpreter.
            batch.validate(full=True)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a whole Arrow file ({error}): copy it again") from None
        yield batch.select(names).to_pylist() if names else [{}] * batch.num_rows


def columns_for(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Those of the columns ``names`` that hold one of ``keys``, whole or nested by dots."""
    wanted = {*keys, *(key.split(".")[0] for key in keys)}
    return [name for name in names if name in wanted]


def dataset_lines(name: str) -> Iterator[bytes]:
    """The rows of a data set of the datasets library as JSON lines; ``name`` is NAME or NAME:SPLIT.

    Raises:
        DataError: the library is not installed, or has no such data set.
    """
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise DataError(
            f"--input hf:{name} needs the datasets library: pip install datasets, or download the data set's "
            "Parquet files and give their folder"
        ) from None
    path, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(path, split=split or "train", streaming=True)
    except Exception as error:  # of many libraries below; all mean that it cannot be had
        raise DataError(f"--input hf:{name}: the datasets library cannot open it ({error})") from None
    for row in rows:
        yield orjson.dumps(row, default=str) + b"\n"
