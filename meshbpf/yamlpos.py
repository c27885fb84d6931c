"""YAML (and so JSON) text to plain values which know where they stand: every key and value has its line and column.

Rules: pure, never raises on bad text (faults come back with their position, next to the documents read before them),
and bounded: by size, by depth, and by what aliases may repeat ("billion laughs"). Scalars follow YAML 1.2: `off`
is a word and not False, `10:30` is no number. Built from events, because the C composer of PyYAML recurses on the C
stack and a file of a hundred thousand `[` would kill the process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

try:
    from yaml import CBaseLoader as _Loader
except ImportError:  # PyYAML without libyaml: the same events, slower
    from yaml import BaseLoader as _Loader  # type: ignore[assignment]

MAX_BYTES = 32 * 1024 * 1024
MAX_DEPTH = 64
MAX_REPEATED = 100_000  # values that aliases may stand for, in one text

_TAG = "tag:yaml.org,2002:"
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,18}", re.ASCII)
_OTHER_INT = re.compile(r"0o[0-7]{1,20}|0x[0-9a-fA-F]{1,16}", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?", re.ASCII)


class Mark(NamedTuple):
    """A place in a file; lines and columns begin with 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Map(dict[str, Any]):
    """A mapping that remembers where each key (`keys_at`) and each value (`at`) stands."""

    __slots__ = ("at", "keys_at")

    def __init__(self) -> None:
        super().__init__()
        self.keys_at: dict[str, Mark] = {}
        self.at: dict[str, Mark] = {}


class Seq(list[Any]):
    """A list that remembers where each item stands."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        super().__init__()
        self.at: list[Mark] = []


@dataclass(frozen=True, slots=True)
class Fault:
    at: Mark
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: None, bool, int, float, str, `Map` or `Seq`, and where it begins."""

    value: Any
    at: Mark


@dataclass(slots=True)
class Text:
    """What one text holds. With `faults` the documents are those that came before the text stopped making sense.
    `repeated`: how many of the values are there by an alias.
    """

    documents: list[Document] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    repeated: int = 0


def read(file: str, text: str, first_line: int = 1) -> Text:
    """All documents of `text`; `file` is only the name used in positions, and `first_line` where in it the text begins
    (for a text without faults: their positions know nothing of it).
    """
    result = Text()
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        message = f"too large: {size} bytes, at most {MAX_BYTES} are read: split the file"
        result.faults.append(Fault(Mark(file, 1, 1), message))
        return result
    builder = _Builder(file, result, first_line)
    try:
        for event in yaml.parse(text.removeprefix("\ufeff"), Loader=_Loader):
            builder.take(event)
    except _Stop as stop:
        result.faults.append(stop.fault)
    except (yaml.reader.ReaderError, UnicodeEncodeError) as error:
        result.faults.append(Fault(_unreadable(file, text), f"not YAML: {error.reason}"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = _inside(file, text, mark.line, mark.column) if mark else Mark(file, 1, 1)
        context = f" {error.context}" if error.context else ""
        if error.context_mark and mark and error.context_mark.line != mark.line:
            context += f" that begins at line {error.context_mark.line + 1}"  # an unclosed bracket fails far below
        tab = mark is not None and _is_tab(text, mark.line, mark.column)
        why = "a tab stands here, and YAML indents with spaces: write spaces" if tab else f"{error.problem}{context}"
        result.faults.append(Fault(at, f"not YAML: {why}"))
    return result


class _Stop(Exception):
    """The rest of the text cannot be read."""

    def __init__(self, at: Mark, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(at, message)


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been seen yet, with the key whose value comes next, when it is a mapping."""

    value: Map | Seq
    at: Mark
    anchor: str | None
    size: int = 1
    key: str | None = None
    key_at: Mark | None = None


class _Builder:
    """Puts events together without recursion. One instance per text; anchors end with their document."""

    def __init__(self, file: str, result: Text, first_line: int) -> None:
        self._file = file
        self._first = first_line
        self._result = result
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int] | None] = {}  # None: still open, so an alias to it would be endless

    def take(self, event: yaml.Event) -> None:
        mark = event.start_mark
        at = Mark(self._file, mark.line + self._first, mark.column + 1) if mark else Mark(self._file, 1, 1)
        match event:
            case yaml.ScalarEvent():
                value = self._scalar(event, at)
                if event.anchor is not None:
                    self._anchors[event.anchor] = (value, 1)
                self._put(value, at, 1)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._begin(event, at)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._end()
            case yaml.AliasEvent():
                self._alias(event, at)
            case yaml.DocumentStartEvent():
                self._anchors.clear()

    def _begin(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, at: Mark) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise _Stop(at, f"nested deeper than {MAX_DEPTH} levels")
        if self._open and isinstance(self._open[-1].value, Map) and self._open[-1].key is None:
            raise _Stop(at, "a key must be a string, got a list or mapping")
        is_map = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{_TAG}map" if is_map else f"{_TAG}seq"):
            raise _Stop(at, f"the tag {event.tag} is not supported: remove it")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._open.append(_Open(Map() if is_map else Seq(), at, event.anchor))

    def _end(self) -> None:
        done = self._open.pop()
        if done.anchor is not None:
            self._anchors[done.anchor] = (done.value, done.size)
        self._put(done.value, done.at, done.size)

    def _alias(self, event: yaml.AliasEvent, at: Mark) -> None:
        if event.anchor not in self._anchors:
            raise _Stop(at, f"unknown alias *{event.anchor}: no &{event.anchor} before it")
        known = self._anchors[event.anchor]
        if known is None:
            raise _Stop(at, f"*{event.anchor} is inside its own anchor")
        self._result.repeated += known[1]
        if self._result.repeated > MAX_REPEATED:
            raise _Stop(at, f"aliases repeat more than {MAX_REPEATED} values: write fewer aliases")
        self._put(known[0], at, known[1])

    def _put(self, value: Any, at: Mark, size: int) -> None:
        """A finished value: it is a document, an item, a key, or the value of the key before it."""
        if not self._open:
            self._result.documents.append(Document(value, at))
            return
        top = self._open[-1]
        top.size += size
        if isinstance(top.value, Seq):
            top.value.append(value)
            top.value.at.append(at)
        elif top.key is None:
            self._key(top, value, at)
        else:
            assert top.key_at is not None
            if (first := top.value.keys_at.get(top.key)) is not None:
                # The text still makes sense: the first value stays and reading goes on, to report the rest as well.
                message = f'duplicate key "{top.key}": first given at line {first.line}'
                self._result.faults.append(Fault(top.key_at, message))
            else:
                top.value[top.key] = value
                top.value.keys_at[top.key] = top.key_at
                top.value.at[top.key] = at
            top.key = None

    def _key(self, top: _Open, value: Any, at: Mark) -> None:
        if value == "<<":
            raise _Stop(at, "merge keys (<<) are not supported: write the fields out")
        if not isinstance(value, str):
            shown = "a list or mapping" if isinstance(value, Map | Seq) else f"{value!r}: quote it"
            raise _Stop(at, f"a key must be a string, got {shown}")
        top.key, top.key_at = value, at

    def _scalar(self, event: yaml.ScalarEvent, at: Mark) -> Any:
        tag, text = event.tag, event.value
        if tag in ("!", f"{_TAG}str") or (tag is None and not event.implicit[0]):
            return text
        value = _resolve(text)
        if tag is not None and tag != _TAG + _kind(value):
            raise _Stop(at, f"the tag {tag} is not supported here: remove it")
        return value


def _resolve(text: str) -> Any:
    """An unquoted scalar by YAML 1.2's core schema; what that calls infinity or not-a-number stays text."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _OTHER_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "bool", int: "int", float: "float"}.get(type(value), "str")


def _inside(file: str, text: str, line: int, column: int) -> Mark:
    """A fault at the end of the text is reported behind its last line: no editor can go to the line after it."""
    lines = text.splitlines()
    if line >= len(lines) > 0:
        return Mark(file, len(lines), len(lines[-1]) + 1)
    return Mark(file, line + 1, column + 1)


def _is_tab(text: str, line: int, column: int) -> bool:
    lines = text.splitlines()
    return line < len(lines) and lines[line][column : column + 1] == "\t"


def _unreadable(file: str, text: str) -> Mark:
    """Where the first character stands that YAML forbids. (PyYAML's own position counts bytes or characters.)"""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    before = text[: bad.start()] if bad else ""
    return Mark(file, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
