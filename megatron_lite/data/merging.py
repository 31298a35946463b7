"""Several token files as one: what ``tools/merge_data.py`` does.

Tokens are copied in buffers, documents keep their boundaries, and nothing is held in memory but those
buffers: the time is the disk's. Checksums of the inputs, where their side files have them, are compared on
the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lite.data.indexed import DTYPE_CODES, IndexedDataset, bin_path, idx_path, write_index
from megatron_lite.data.inspection import check_index
from megatron_lite.data.preprocessing.facts import facts_path, file_checksum, read_facts, write_facts
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

COPY_BYTES = 4 << 20
"""Read, converted and written at once."""


@dataclass(frozen=True)
class Part:
    """One of the files that are merged.

    Attributes:
        corpus: its documents.
        facts: what its side file says; None without one.
    """

    corpus: IndexedDataset
    facts: dict[str, Any] | None

    @property
    def fingerprint(self) -> str | None:
        """Of its tokenizer; None if it is not known."""
        return ((self.facts or {}).get("tokenizer") or {}).get("fingerprint")


@dataclass
class Copied:
    """What is known of a part once it is copied: checksum of its .bin, smallest and largest id."""

    checksum: str
    smallest: int
    largest: int


def prefixes_in(folder: Path) -> list[Path]:
    """The ``.bin/.idx`` pairs in ``folder``, by name.

    Raises:
        DataError: it is no folder, has no pair, or half of one.
    """
    if not folder.is_dir():
        raise DataError(f"--input {folder}: there is no such folder; give single files with --prefixes")
    names = sorted({path.stem for path in folder.iterdir() if path.suffix in (".bin", ".idx")})
    prefixes = [folder / name for name in names]
    if not prefixes:
        raise DataError(f"--input {folder}: there is no .bin/.idx pair in this folder")
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise DataError(
                    f"{path} is missing: a pair is two files; copy it again or give --prefixes without it"
                )
    return prefixes


def merge(prefixes: Sequence[Path], output: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write the documents of ``prefixes``, in order, as one pair with a side file; returns its prefix.

    Args:
        prefixes: ``.bin/.idx`` pairs, of any integer types: the result's holds them all.
        output: prefix to write.
        say: is told of what cannot be checked.

    Raises:
        DataError: the output exists, an input is damaged or is named twice, or tokenizers differ.
        OSError: e.g. the disk is full; nothing is written then.
    """
    for path in (bin_path(output), idx_path(output), facts_path(output)):
        if path.exists():
            raise DataError(f"{path} exists and is left as it is: delete it or give another --output-prefix")
    parts = open_parts(prefixes)
    refuse_mixed_tokenizers(parts, say)
    dtype = common_dtype(parts)
    # The index last: whoever sees it finds the rest.
    with (
        atomic_path(idx_path(output)) as index,
        atomic_path(facts_path(output)) as side_file,
        atomic_path(bin_path(output)) as tokens,
    ):
        copies, checksum = copy_tokens(parts, dtype, tokens)
        write_index(
            index, dtype, [part.corpus.lengths for part in parts], [part.corpus.documents for part in parts]
        )
        checksums = {"bin": checksum, "idx": file_checksum(index)}
        write_facts(side_file, {**merged_facts(parts, copies), "xxh3_128": checksums})
    return output


def open_parts(prefixes: Sequence[Path]) -> list[Part]:
    """The inputs. Raises DataError when one is damaged or is given twice."""
    if not prefixes:
        raise DataError("there is nothing to merge: give --input FOLDER or --prefixes")
    seen: set[Path] = set()
    parts = []
    for prefix in prefixes:
        if prefix.resolve() in seen:
            raise DataError(
                f"{prefix} is given twice: name each input once, since its documents would repeat"
            )
        seen.add(prefix.resolve())
        corpus = IndexedDataset(prefix)
        check_index(corpus)
        parts.append(Part(corpus, read_facts(prefix)))
    return parts


def refuse_mixed_tokenizers(parts: Sequence[Part], say: Callable[[str], None]) -> None:
    """Raise DataError when two parts are known to be of different tokenizers; ``say`` what is not known."""
    known = [part for part in parts if part.fingerprint]
    for part in known:
        if part.fingerprint != known[0].fingerprint:
            first, other = (
                each.facts["tokenizer"]["tokenizer_type"] for each in (known[0], part) if each.facts
            )
            raise DataError(
                f"{part.corpus.prefix} was encoded by another tokenizer ({other}) than "
                f"{known[0].corpus.prefix} ({first}): the same ids mean other text there; preprocess it "
                "with the same tokenizer"
            )
    unknown = [part.corpus.prefix for part in parts if not part.fingerprint]
    if unknown:
        say(
            f"no side file tells the tokenizer of {unknown[0]}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + ": make sure that it is the same"
        )


def common_dtype(parts: Sequence[Part]) -> np.dtype:
    """The smallest type that holds the ids of all parts."""
    dtype = np.result_type(*(part.corpus.dtype for part in parts)).newbyteorder("<")
    assert dtype in DTYPE_CODES, dtype
    return dtype


def copy_tokens(parts: Sequence[Part], dtype: np.dtype, path: Path) -> tuple[list[Copied], str]:
    """Write the tokens of ``parts`` to ``path``: what is known of each, and the checksum of the result.

    Raises:
        DataError: a part is not what its side file says.
    """
    copies = []
    whole = xxhash.xxh3_128()
    with open(path, "wb") as output:
        for part in parts:
            digest = xxhash.xxh3_128()
            smallest, largest = np.iinfo(np.int64).max, np.iinfo(np.int64).min
            with open(part.corpus.bin_path, "rb") as source:
                while block := source.read(COPY_BYTES):
                    digest.update(block)
                    ids = np.frombuffer(block, part.corpus.dtype)
                    smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
                    converted = ids.astype(dtype, copy=False).data
                    whole.update(converted)
                    output.write(converted)
            copies.append(Copied(digest.hexdigest(), smallest, largest))
            expected = ((part.facts or {}).get("xxh3_128") or {}).get("bin")
            if expected not in (None, copies[-1].checksum):
                raise DataError(
                    f"{part.corpus.bin_path} is not what {facts_path(part.corpus.prefix).name} says (its "
                    "checksum differs): copy both again or preprocess the text again"
                )
    return copies, whole.hexdigest()


def merged_facts(parts: Sequence[Part], copies: Sequence[Copied]) -> dict[str, Any]:
    """The side file, but for the checksums."""
    facts = [part.facts or {} for part in parts]
    text_bytes = [each.get("text_bytes") for each in facts]
    known = all(part.fingerprint for part in parts)
    return {
        "tokens": sum(len(part.corpus.tokens) for part in parts),
        "documents": sum(part.corpus.document_count for part in parts),
        "text_bytes": None if None in text_bytes else sum(filter(None, text_bytes)),
        "smallest": min(copy.smallest for copy in copies),
        "largest": max(copy.largest for copy in copies),
        "tokenizer": facts[0]["tokenizer"] if known else None,
        "sources": [
            {
                "prefix": str(part.corpus.prefix),
                "tokens": len(part.corpus.tokens),
                "documents": part.corpus.document_count,
                "xxh3_128": {"bin": copy.checksum},
                "sources": each.get("sources"),
            }
            for part, copy, each in zip(parts, copies, facts, strict=True)
        ],
    }
