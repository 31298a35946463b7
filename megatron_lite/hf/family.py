"""What a Hugging Face family is: which models it expresses, its config.json, its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lite.config import Config

LAYER = "{i}"
"""Stands for the number of a layer in a name."""


@dataclass(frozen=True)
class Entry:
    """One row of a family's table: the same tensor under both names.

    Attributes:
        ours: global name, with :data:`LAYER` where the layer's number goes.
        theirs: name in the family's files, likewise.
    """

    ours: str
    theirs: str


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Attributes:
        name: ``model_type`` of its config.json.
        reasons_against: why it cannot express a configuration; nothing when it can.
        config: the fields of config.json, without dtype and special tokens.
        entries: the table for a configuration.
    """

    name: str
    reasons_against: Callable[[Config], Iterator[str]]
    config: Callable[[Config], dict[str, Any]]
    entries: Callable[[Config], list[Entry]]

    def table(self, config: Config) -> dict[str, Entry]:
        """The table with the layers written out, by our name."""
        table = {}
        for entry in self.entries(config):
            numbers = range(config.model.num_layers) if LAYER in entry.ours else (0,)
            for number in numbers:
                ours, theirs = (name.replace(LAYER, str(number)) for name in (entry.ours, entry.theirs))
                table[ours] = Entry(ours, theirs)
        return table
