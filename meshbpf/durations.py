"""Durations as people write them (`1h30m`, `250ms`) to seconds and back. Pure; the one place that knows the form.

The form is Gateway API's (GEP-2257): one to four pairs of a whole number (at most five digits) and h, m, s or ms.
"""

from __future__ import annotations

import re

FORM = "^([0-9]{1,5}(h|m|s|ms)){1,4}$"

_WHOLE = re.compile(r"([0-9]{1,5}(h|m|s|ms)){1,4}", re.ASCII)
_PAIR = re.compile(r"([0-9]{1,5})(ms|h|m|s)", re.ASCII)
_MILLISECONDS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_LARGEST = 99_999


def parse(text: str) -> float:
    """Seconds in `text`. Raises ValueError, whose message says what a duration looks like."""
    if _WHOLE.fullmatch(text) is None:
        raise ValueError(f'"{text}" is not a duration: write for example 5s, 250ms or 1h30m')
    # Whole milliseconds first: 0.1 + 0.2 must not show up in somebody's comparison of two configurations.
    return sum(int(number) * _MILLISECONDS[unit] for number, unit in _PAIR.findall(text)) / 1000


def render(seconds: float) -> str:
    """The shortest duration string of `seconds`, rounded to milliseconds; `parse` gives the same value back."""
    rest = round(seconds * 1000)
    if rest < 0 or rest // _MILLISECONDS["h"] > _LARGEST:
        raise ValueError(f"{seconds} s cannot be written as a duration")
    parts = []
    for unit, size in _MILLISECONDS.items():
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"
