"""A JSON document at the speed of C, without positions; None for every text that is not simply that. Pure.

The rule: whatever comes back is what `yamlpos` would read; where the two could differ (a key twice, a character that
YAML forbids, an escape that it reads in another way) nothing comes back, and `yamlpos` reads the text.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import yaml


class Value(NamedTuple):
    """What a text says, and at which of its lines and columns that begins."""

    value: Any
    line: int
    column: int


def read(text: str) -> Value | None:
    inside = text.lstrip(" \n")
    if not inside.startswith("{") or "\\u" in text or "\r" in text or "\x7f" in text:
        return None
    # What else YAML forbids of ASCII, JSON forbids as well.
    if not text.isascii() and yaml.reader.Reader.NON_PRINTABLE.search(text):
        return None
    try:
        value = _decode(inside)
    except (ValueError, RecursionError):
        return None
    before = text[: len(text) - len(inside)]
    return Value(value, 1 + before.count("\n"), len(before) - before.rfind("\n"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or "<<" in found:
        raise ValueError
    return found


_decode = json.JSONDecoder(object_pairs_hook=_once).decode
