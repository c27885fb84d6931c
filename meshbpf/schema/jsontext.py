"""JSON documents of a text at the speed of C, without positions; None for every text that is not simply that. Pure.

The rule: whatever comes back is what `yamlpos` would read; where the two could differ (a key twice, a character that
YAML forbids, an escape that it reads in another way) nothing comes back, and `yamlpos` reads the text.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import yaml

from meshbpf import yamlpos

_BREAK = re.compile(r"^---[ \t]*\n", re.MULTILINE)
_ODD = re.compile(r"\\u|\r", re.ASCII)


class Piece(NamedTuple):
    """One document: its value, where it begins, and its text with the line at which that begins."""

    value: Any
    line: int
    column: int
    text: str
    first_line: int


def read(text: str) -> list[Piece] | None:
    if not text.startswith(("{", "---\n", "--- \n")) or len(text) > yamlpos.MAX_BYTES or _ODD.search(text):
        return None
    if yaml.reader.Reader.NON_PRINTABLE.search(text):
        return None
    found, line = [], 1
    decode = json.JSONDecoder(object_pairs_hook=_once).decode
    for number, chunk in enumerate(_BREAK.split(text)):
        line += number > 0  # the break itself
        inside = chunk.lstrip()
        if inside:
            if not inside.startswith("{"):
                return None
            try:
                value = decode(inside)
            except (ValueError, RecursionError):
                return None
            before = chunk[: len(chunk) - len(inside)]
            column = len(before) - before.rfind("\n")
            found.append(Piece(value, line + before.count("\n"), column, chunk, line))
        line += chunk.count("\n")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or "<<" in found:
        raise ValueError
    return found
