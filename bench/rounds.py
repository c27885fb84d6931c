"""The order of measuring: rounds, shuffled subjects, more rounds where the answer is not clear. Decides nothing else.

In a round every subject of the row is measured once, in an order drawn anew, so that neither a slow drift of the
machine nor "always after Envoy" can favour one. Nothing is dropped, a disturbed round counts like any other.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import Row, too_wide
from bench.load import Load
from bench.subjects import Subject

Rounds = list[dict[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often; `most` bounds the extra rounds of a row whose intervals stay wide."""

    rounds: int
    most: int
    seconds: float
    step: int = 5


# Quick proves that everything works and must end within two minutes; its intervals mean little.
FULL = Plan(rounds=15, most=45, seconds=3)
QUICK = Plan(rounds=1, most=1, seconds=1)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Runner:
    def __init__(self, load: Load, plan: Plan, subjects: dict[str, Subject], seed: int) -> None:
        self.load, self.plan, self.subjects = load, plan, subjects
        self.failed: dict[str, str] = {}  # subjects that broke during the run, and how
        self.dice = random.Random(seed)

    def row(self, row: Row, into: Rounds, rate: float | None = None) -> None:
        """Measure a row; rounds are appended to `into` as they end, so that an interruption keeps what was done."""
        names = [name for name in row.subjects if name in self.subjects]
        self._rounds(row, names, self.plan.rounds, into, rate)
        while len(into) < self.plan.most:
            wide = too_wide(row, into)
            needed = {name for figure in wide for name in (figure.subject, figure.base) if name} - self.failed.keys()
            if not needed:
                return
            say(f"{row.name}: interval still wide for {', '.join(sorted(needed))}: more rounds")
            more = min(self.plan.step, self.plan.most - len(into))
            self._rounds(row, [name for name in names if name in needed], more, into, rate)

    def _rounds(self, row: Row, names: Sequence[str], count: int, into: Rounds, rate: float | None) -> None:
        begun = time.monotonic()
        for number in range(1, count + 1):
            order = self.dice.sample(list(names), len(names))
            into.append({})
            for name in order:
                if name in self.subjects:
                    self._cell(name, row, into[-1], rate)
            left = (time.monotonic() - begun) / number * (count - number)
            cells = "  ".join(_brief(name, into[-1][name], rate is not None) for name in names if name in into[-1])
            say(f"{row.name} round {number}/{count}, {left:.0f} s left: {cells}")

    def _cell(self, name: str, row: Row, cells: dict[str, dict[str, Any]], rate: float | None) -> None:
        """A subject that breaks is left out from here on and fails its figures; the others go on."""
        try:
            cells[name] = self.load.cell(self.subjects[name], row, self.plan.seconds, rate)
        except RuntimeError as error:
            say(f"{name} broke: {error}")
            self.failed[name] = str(error)
            del self.subjects[name]


def _brief(name: str, cell: Mapping[str, Any], latency: bool) -> str:
    errors = f" {cell['errors']} errors" if cell["errors"] else ""
    rest = f"p99 {cell['p99_us']:.0f}us" if latency else f"{cell['rps']:.0f}/s"
    return f"{name} {cell['cpu_us']:.1f}us {rest}{errors}"
