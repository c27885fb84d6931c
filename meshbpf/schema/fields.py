"""Typed reading of one mapping: every field is asked for once, and what nobody asked for is unknown and refused.

Rules: a wrong value is reported with its position and what was expected, and reading goes on with the default; a value
of null is a field left out; messages name the field by its path below the document (`spec.ports[0].port`); one mistake
is one fault, also where it makes a known field unknown and a required one missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeVar

from meshbpf import durations
from meshbpf.schema import later
from meshbpf.schema.report import Report
from meshbpf.schema.words import meant, near, quoted, shown
from meshbpf.yamlpos import Map, Mark, Seq

E = TypeVar("E", bound=StrEnum)

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_INDEX = re.compile(r"\[[0-9]+\]")


class Fields:
    """One mapping of a document. Call `done` on the outermost one when everything was asked for."""

    def __init__(self, kind: str, path: str, value: Any, at: Mark, report: Report) -> None:
        self.at = at
        self.report = report
        self._kind = kind
        self.path = path
        self._asked: list[str] = []
        self._children: list[Fields] = []
        self._missing: dict[str, tuple[Mark, str]] = {}  # required and not there: the fault that was reported
        self._broken = value is not None and not isinstance(value, Map)  # then nothing below it can be missing
        self._map = value if isinstance(value, Map) else Map()
        self.given = isinstance(value, Map)
        if self._broken:
            report.add(at, f"{path or 'a document'} must be a mapping, got {shown(value)}")

    def done(self) -> None:
        """Report every field that was never asked for, here and below."""
        unknown = [key for key, at in self._map.keys_at.items() if key not in self._asked and not self._later(key, at)]
        for child in self._children:
            if outside := [key for key in unknown if child.lacks(key)]:
                unknown = [key for key in unknown if key not in outside]
                self._belong(child, outside)
        if len(unknown) == len(self._map) and not any(near(key, self._asked) for key in unknown):
            self._foreign(unknown)
        else:
            for key in unknown:
                self._withdraw(near(key, self._asked))
                self._unknown([key], meant(key, self._asked))
        for child in self._children:
            child.done()

    def _unknown(self, keys: Sequence[str], hint: str) -> None:
        """One fault, at the first of them."""
        place = f" in {self.path}" if self.path else ""
        fields = f"field{'s' if len(keys) > 1 else ''} {quoted(keys)}"
        self.report.add(self._map.keys_at[keys[0]], f"unknown {fields}{place}: {hint}")

    def _foreign(self, keys: Sequence[str]) -> None:
        """Nothing in it is known: it is something else altogether, of which nothing is missing."""
        if keys:
            self._withdraw(*self._missing)
            self._unknown(keys, meant("", self._asked))

    def lacks(self, key: str) -> bool:
        """Whether `key` is a field of this mapping, an item of no list, and left out."""
        return key in self._asked and not self.has(key) and not self.path.endswith("]") and not self._broken

    def _belong(self, child: Fields, keys: Sequence[str]) -> None:
        child._withdraw(*keys)
        them = "belongs below {}: indent it" if len(keys) == 1 else "belong below {}: indent them"
        self.report.add(self._map.keys_at[keys[0]], f"{quoted(keys)} {them.format(child.path)}")

    def _withdraw(self, *keys: str) -> None:
        for key in keys:
            if (fault := self._missing.pop(key, None)) is not None:
                self.report.withdraw(*fault)

    def keys(self) -> list[str]:
        """What the file gives, whether or not it is known."""
        return list(self._map)

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def where(self, key: str) -> Mark:
        """Where the value of `key` stands, or where the mapping begins when it has none."""
        return self._map.at.get(key, self.at)

    def has(self, key: str) -> bool:
        return self._map.get(key) is not None

    def wrong(self, key: str, expected: str) -> None:
        self.report.add(self.where(key), f"{self.name(key)} must be {expected}, got {shown(self._map.get(key))}")

    def value(self, key: str) -> Any:
        """The raw value, None when left out; from here on the field is known."""
        if key not in self._asked:
            self._asked.append(key)
        return self._map.get(key)

    def required(self, key: str, expected: str) -> bool:
        """Whether the field is there; reported when not."""
        if self.value(key) is None:
            if not self._broken:
                at = self._map.at.get(key, self.at)
                self._missing[key] = (at, f"{self.name(key)} is missing: it must be {expected}")
                self.report.add(*self._missing[key])
            return False
        return True

    def text(self, key: str, default: str = "") -> str:
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong(key, "a string" if isinstance(value, Map | Seq) else "a string (in quotes)")
            return default
        return value

    def label(self, key: str, default: str = "") -> str:
        """A name by RFC 1123: what DNS and Kubernetes take as one label."""
        text = self.text(key, default)
        if self.has(key) and isinstance(self._map[key], str) and LABEL.fullmatch(text) is None:
            self.wrong(key, "a DNS label (a-z, 0-9 and -, at most 63)")
            return default
        return text

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(key, "true or false")
        return default

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.wrong(key, f"a whole number from {low} to {high}")
            return default
        return value

    def percent(self, key: str, default: float) -> float:
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            self.wrong(key, "a percentage from 0 to 100")
            return default
        return float(value)

    def duration(self, key: str, default: float, *, positive: bool = False) -> float:
        value = self.value(key)
        if value is None:
            return default
        try:
            seconds = durations.parse(value if isinstance(value, str) else "")
        except ValueError:
            self.wrong(key, "a duration like 5s, 250ms or 1h30m")
            return default
        if positive and seconds == 0:
            self.wrong(key, "a duration above zero")
            return default
        return seconds

    def word(self, key: str, default: E) -> E:
        """One of the words of an enum, without those for later; the default says which enum."""
        value = self.value(key)
        if value is None:
            return default
        slot = self._slot(key)
        words = [str(word) for word in type(default) if f"{slot}={word}" not in later.FIELDS]
        if value in words:
            return type(default)(value)
        if (what := later.FIELDS.get(f"{slot}={value}")) is not None:
            self.report.add(self.where(key), later.refusal(what, f"use one of {', '.join(words)}"))
        else:
            self.wrong(key, f"one of {', '.join(words)}")
        return default

    def below(self, key: str) -> Fields:
        """The mapping under `key`; left out, it is one without fields, so that its defaults are read all the same."""
        child = Fields(self._kind, self.name(key), self.value(key), self.where(key), self.report)
        child._broken |= self._broken
        self._children.append(child)
        return child

    def items(self, key: str) -> Iterator[tuple[str, Any, Mark]]:
        """(path, value, place) of every item of a list."""
        value = self.value(key)
        if value is None:
            return
        if not isinstance(value, Seq):
            self.wrong(key, "a list")
            return
        for index, (item, at) in enumerate(zip(value, value.at, strict=True)):
            yield f"{self.name(key)}[{index}]", item, at

    def mappings(self, key: str, expected: str = "a mapping") -> Iterator[Fields]:
        """Every item of a list of mappings."""
        for path, item, at in self.items(key):
            if not isinstance(item, Map):
                self.report.add(at, f"{path} must be {expected}, got {shown(item)}")
                continue
            child = Fields(self._kind, path, item, at, self.report)
            self._children.append(child)
            yield child

    def pairs(self, key: str, expected: str = "a mapping") -> Iterator[tuple[str, Any, Mark, Mark]]:
        """(key, value, place of the key, place of the value) of a mapping whose keys the user chooses."""
        value = self.value(key)
        if value is None:
            return
        if not isinstance(value, Map):
            self.wrong(key, expected)
            return
        for name, item in value.items():
            yield name, item, value.keys_at[name], value.at[name]

    def labels(self, key: str) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for name, item, _, at in self.pairs(key):
            if isinstance(item, str):
                found[name] = item
            else:
                self.report.add(at, f"{self.name(key)}.{name} must be a string (in quotes), got {shown(item)}")
        return MappingProxyType(found)

    def _slot(self, key: str) -> str:
        return f"{self._kind}.{_INDEX.sub('', self.name(key))}"

    def _later(self, key: str, at: Mark) -> bool:
        if (what := later.FIELDS.get(self._slot(key))) is None:
            return False
        self.report.add(at, later.refusal(what, f"remove {self.name(key)}"))
        return True
