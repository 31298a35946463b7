"""What may be done to a text before it is encoded, and which records are taken."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lite.utils.errors import DataError

if TYPE_CHECKING:
    from megatron_lite.data.preprocessing.conversations import ConversationSettings

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
"""Sign in a filter → what it asks."""


class BadRecord(ValueError):
    """Why a record is broken."""


@dataclass(frozen=True)
class TextSettings:
    """Steps between a record and its text.

    Attributes:
        ftfy: whether to mend text that was decoded wrongly, by the ftfy library.
        normal_form: Unicode normal form (NFC, NFKC, NFD, NFKD), or None.
        min_length: characters that the text under each key must have for the record to be taken.
        filter: condition on a record, see :class:`Predicate`.
        replace_invalid: whether bytes that are not UTF-8 become U+FFFD instead of spoiling the record.
        conversation: how a record becomes segments, the JSON of which is its text; None: it has text.
    """

    ftfy: bool = False
    normal_form: str | None = None
    min_length: int = 0
    filter: str | None = None
    replace_invalid: bool = False
    conversation: ConversationSettings | None = None

    @property
    def changes_text(self) -> bool:
        """Whether :func:`transformed` or the length matter."""
        return self.ftfy or self.normal_form is not None or self.min_length > 0


def transformed(text: str, settings: TextSettings) -> str:
    """``text`` after ftfy and normalisation."""
    if settings.ftfy:
        import ftfy

        text = ftfy.fix_text(text)
    if settings.normal_form is not None:
        text = unicodedata.normalize(settings.normal_form, text)  # type: ignore[arg-type]
    return text


class Predicate:
    """A condition: ``key`` (present and true), ``key=value``, ``!=``, ``<``, ``<=``, ``>``, ``>=``.

    Keys may be nested by dots. Numbers compare as numbers, anything else as text; a record without the key
    is not taken.

    Raises:
        DataError: the condition has no key.
    """

    def __init__(self, condition: str) -> None:
        match = re.fullmatch(r"\s*([^<>=!]+?)\s*(?:(>=|<=|!=|=|>|<)\s*(.*?))?\s*", condition)
        if match is None:
            raise DataError(f"--filter {condition!r} is no condition: write KEY, KEY=VALUE or KEY>=NUMBER")
        self.key, self._sign, self._value = match.groups()

    def __call__(self, record: Any) -> bool:
        """Whether ``record`` is taken."""
        value: Any = record
        if isinstance(record, dict) and self.key in record:
            value = record[self.key]
        else:
            for part in self.key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            return False
        if self._sign is None:
            return bool(value)
        return COMPARISONS[self._sign](*self._comparable(value))

    def _comparable(self, value: Any) -> tuple[Any, Any]:
        if isinstance(value, bool):
            return str(value).lower(), self._value.lower()
        if isinstance(value, (int, float)):
            try:
                return float(value), float(self._value)
            except ValueError:
                pass
        return str(value), self._value
