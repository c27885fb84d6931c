"""A text cut where its documents begin: what says the same at the same place as before need not be read again. Pure.

The rule: the pieces, each read as a text of its own, say what the whole text says, but for how much aliases may repeat
in one text, which is for the reader to add up. Where they might not (a directive governs what follows it, other line
ends are counted otherwise) the whole text is one piece.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from meshbpf import yamlpos

_BREAK = re.compile(r"---[ \t]*\n")
_ONE = re.compile("[\r\x85\u2028\u2029\ufeff]|^%|^\\.\\.\\.", re.MULTILINE)
_ONE_OF_ASCII = ("\r", "\n%", "\n...")
_WIDEST = 4  # bytes of a character


class Piece(NamedTuple):
    """`first_line`: the line of the whole text that it begins with."""

    text: str
    first_line: int


def cut(text: str) -> list[Piece]:
    """Pieces in their order; those without a document are left out."""
    if not _may_be_cut(text):
        return [Piece(text, 1)]
    found: list[Piece] = []
    line, begin = 1, 0
    for match in _BREAK.finditer(text):
        here = match.start()
        if here and text[here - 1] != "\n":
            continue
        line = _add(found, text[begin:here], line) + 1  # the break's own line
        begin = match.end()
    _add(found, text[begin:], line)
    return found


def _may_be_cut(text: str) -> bool:
    if text.isascii():
        return (
            len(text) <= yamlpos.MAX_BYTES
            and not text.startswith(("%", "..."))
            and not any(one in text for one in _ONE_OF_ASCII)
        )
    return len(text) * _WIDEST <= yamlpos.MAX_BYTES and _ONE.search(text) is None


def _add(found: list[Piece], text: str, line: int) -> int:
    if text and not text.isspace():
        found.append(Piece(text, line))
    return line + text.count("\n")
