"""How lists and facts become lines: as wide as the terminal, nothing cut. Pure: what the screen is like is given.

A row that is too long has its prose wrapped, within the columns that allow it; then columns go, those first that matter
least, and a line below says which; what matters stays, however narrow it is. Where nobody looks at a terminal (a pipe,
a file) one row is one line, so that grep, sort and awk work. Numbers stand to the right; `-` is no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GAP = 2
LEAST = 24  # columns for prose, however narrow the screen
LONG = 40  # a word up to this length, such as a pod's uid, is not broken to save a column
# What a word means, where a column or a head says how things are.
RED, YELLOW, GREEN, BOLD = "31", "33", "32", "1"
MOODS: Mapping[str, str] = {
    "ok": GREEN, "ready": GREEN, "warning": YELLOW, "WARNING": YELLOW, "draining": YELLOW, "error": RED, "ERROR": RED,
    "not_in_kernel": RED, "RESTART": YELLOW, "added": GREEN, "changed": YELLOW, "removed": RED,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Screen:
    """`width` in characters, None: without end."""

    width: int | None = None
    colour: bool = False

    def paint(self, text: str, style: str | None) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.colour and style else text

    def mood(self, word: str, text: str = "") -> str:
        """`text`, or the word itself, in the colour of what the word means."""
        return self.paint(text or word, MOODS.get(word))


@dataclass(frozen=True, slots=True)
class Column:
    """`key` of a row under `head`. `wide`: only in `-o wide`, which drops nothing. `drop`: 0 stays, else the highest
    goes first. `wrap`: 0 is one line, else it may be wrapped down to so many characters, or its longest word.
    `moods`: coloured by MOODS. `form` is how a number is shown, if not as it is.
    """

    key: str
    head: str
    wide: bool = False
    drop: int = 0
    wrap: int = 0
    moods: bool = False
    form: Callable[[float], str] | None = None


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], screen: Screen, wide: bool = False) -> str:
    shown = [column for column in columns if wide or not column.wide]
    cells = {column.key: [cell(row.get(column.key), column.form) for row in rows] for column in shown}
    shown, widths = _fit(shown, cells, screen.width, wide)
    right = {column.key for column in shown if _numbers([row.get(column.key) for row in rows])}
    lines = [_line(shown, widths, right, [column.head for column in shown], screen, head=True)]
    for number in range(len(rows)):
        parts = [_wrapped(column, cells[column.key][number], widths[column.key]) for column in shown]
        for depth in range(max(map(len, parts), default=0)):
            texts = [part[depth] if depth < len(part) else "" for part in parts]
            lines.append(_line(shown, widths, right, texts, screen))
    gone = [column.head for column in columns if column not in shown and not column.wide]
    if gone:
        note = f"({', '.join(gone)} left out for want of room: -o wide)"
        lines += wrap(note, max(screen.width or LEAST, LEAST))
    return "\n".join(lines)


def facts(rows: Iterable[tuple[str, str]], screen: Screen) -> str:
    """What is said of each head; lines that go on begin where the first one does."""
    rows = list(rows)
    indent = max((len(head) for head, _text in rows), default=0) + GAP
    room = None if screen.width is None else max(screen.width - indent, LEAST)
    lines = []
    for head, text in rows:
        first, *more = lines_of(text, room)
        lines.append(f"{screen.mood(head)}{' ' * (indent - len(head))}{first}")
        lines += [" " * indent + line for line in more]
    return "\n".join(lines)


def cell(value: object, form: Callable[[float], str] | None = None) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {number}" for key, number in value.items())
    if value is None or value == "":
        return "-"
    return form(value) if form is not None and isinstance(value, (int, float)) else printable(str(value))


def percent(share: float) -> str:
    """To a tenth."""
    return f"{share:.1f}%"


def age(seconds: float) -> str:
    """A duration in its largest two units: `3s`, `2m10s`, `4h5m`, `9d2h`."""
    whole = int(seconds)
    for size, unit, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}{rest}{lower}" if rest else f"{whole // size}{unit}"
    return f"{whole}s"


def printable(text: str) -> str:
    """What programs or cgroups are called must not steer anybody's terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def lines_of(text: str, width: int | None) -> list[str]:
    """What may be several lines, such as the faults of a file: each of them printable, and wrapped."""
    return [line for part in text.split("\n") for line in wrap(printable(part), width)]


def wrap(text: str, width: int | None) -> list[str]:
    """Lines of at most `width`, of whole words; a word that is too long goes on behind a slash or comma, if it can."""
    if width is None or len(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        rest = word
        while len(rest) > width:
            cut = max(rest.rfind(mark, 0, width) for mark in "/,") + 1 or width
            lines[-1], rest = rest[:cut], rest[cut:]
            lines.append("")
        lines[-1] = rest
    return lines


def _fit(
    columns: Sequence[Column], cells: Mapping[str, list[str]], room: int | None, wide: bool
) -> tuple[list[Column], dict[str, int]]:
    """Which columns are shown, and how wide each is."""
    shown = list(columns)
    natural = {c.key: max(len(c.head), *map(len, cells[c.key])) if cells[c.key] else len(c.head) for c in shown}
    least = {c.key: _least(c, cells[c.key], natural[c.key]) for c in shown}
    while True:
        widths = {column.key: natural[column.key] for column in shown}
        excess = sum(widths.values()) + GAP * (len(shown) - 1) - (room or 0) if room is not None else 0
        slack = sum(widths[key] - least[key] for key in widths)
        last = max(shown, key=lambda column: column.drop, default=None)
        if excess > slack and not wide and last is not None and last.drop:
            shown.remove(last)
            continue
        while excess > 0 and (narrower := [key for key in widths if widths[key] > least[key]]):
            widths[max(narrower, key=lambda key: widths[key])] -= 1
            excess -= 1
        return shown, widths


def _least(column: Column, texts: Sequence[str], natural: int) -> int:
    """How narrow a column may become: only very long words are broken."""
    if not column.wrap:
        return natural
    longest = max((len(word) for text in texts for word in text.split()), default=0)
    return min(natural, max(column.wrap, len(column.head), min(longest, LONG)))


def _numbers(values: Sequence[object]) -> bool:
    known = [value for value in values if value not in (None, "")]
    return bool(known) and all(isinstance(value, (int, float)) for value in known)


def _wrapped(column: Column, text: str, width: int) -> list[str]:
    return wrap(text, width) if column.wrap else [text]


def _line(
    columns: Sequence[Column],
    widths: Mapping[str, int],
    right: set[str],
    texts: Sequence[str],
    screen: Screen,
    head: bool = False,
) -> str:
    padded = []
    for column, text in zip(columns, texts, strict=True):
        width = widths[column.key]
        style = BOLD if head else (MOODS.get(text) if column.moods else None)
        blanks = " " * (width - len(text))
        painted = screen.paint(text, style)
        padded.append(blanks + painted if column.key in right else painted + blanks)
    return (" " * GAP).join(padded).rstrip()
