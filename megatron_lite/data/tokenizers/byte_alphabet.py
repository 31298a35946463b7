"""GPT-2's alphabet: a printable character for each byte, in which byte-level BPE vocabularies are written."""

from __future__ import annotations


def _alphabet() -> list[str]:
    """Printable bytes of Latin-1 stand for themselves, the others for U+0100, U+0101, … in order."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


CHARACTER_OF_BYTE: list[str] = _alphabet()
"""The character of each byte."""

BYTE_OF_CHARACTER: dict[str, int] = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}
"""The byte of each character."""
