"""How faults speak: values as messages call them, and the word that was probably meant. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from meshbpf.yamlpos import Map, Seq


def meant(word: str, known: Iterable[str]) -> str:
    """The end of an "unknown" message: the word that was probably meant, or all there are."""
    words = list(known)
    if close := near(word, words):
        return f'did you mean "{close}"?'
    return f"known: {', '.join(words)}" if words else "none is known here"


def near(word: str, known: Sequence[str]) -> str:
    """The known word that was probably meant, if any."""
    close = difflib.get_close_matches(word, known, n=1)
    # difflib minds case; people who come from another tool's spelling do not.
    close = close or [w for w in known if w.lower() == word.lower()]
    return close[0] if close else ""


def shown(value: Any) -> str:
    """A value as an error message calls it."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case str():
            return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
        case Map():
            return "a mapping"
        case Seq():
            return "a list"
    return "nothing"


def quoted(words: Iterable[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
