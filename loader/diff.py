"""Have, want → ordered writes that never misroute a connect() running between two of them. Pure.

The order: what is pointed at comes before what points at it, and goes after it. So endpoints, slots, policies (which
say how many slots count) and services are added in that order and removed in the reverse one. A service whose slots
shrink first gets the smaller count, then loses the slots; one that grows first gets the slots, then the count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loader.plan import Tables

POINTED_AT_FIRST = ("endpoints", "slots", "policies", "services")


@dataclass(frozen=True, slots=True)
class Write:
    """Set `key` of `table` to `value`, or delete it when `value` is None."""

    table: str
    key: bytes
    value: bytes | None


def diff(have: Tables, want: Tables) -> Iterator[Write]:
    """The writes, in order. Equal tables give none."""
    for table in POINTED_AT_FIRST:
        old = getattr(have, table)
        for key, value in getattr(want, table).items():
            if old.get(key) != value:
                yield Write(table, key, value)
    for table in reversed(POINTED_AT_FIRST):
        new = getattr(want, table)
        for key in getattr(have, table):
            if key not in new:
                yield Write(table, key, None)
