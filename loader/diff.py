"""Have, want → ordered writes that never misroute a connect() running between two of them. Pure.

The order: what is pointed at comes before what points at it, and goes after it. So addresses that are no service any
more go first; endpoints, what they serve, slots, policies (which say how many slots count) and services are added in
that order and removed in the reverse one. A service whose slots shrink first gets the smaller count, then other slots;
one that grows first gets the slots, then the count. An endpoint that drains is told so when no slot names it any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from loader import abi
from loader.plan import Table, Tables

REMOVED = ("policies", "slots", "serving", "endpoints")
DRAINING = abi.EndpointValue.draining.offset
Rows = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive writes to one table, in order: rows to set, or keys to delete; never both in one run."""

    table: str
    rows: Rows = field(default_factory=list)
    gone: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) or len(self.gone)


@dataclass(frozen=True, slots=True)
class Write:
    """Set `key` of `table` to `value`, or delete it when `value` is None."""

    table: str
    key: bytes
    value: bytes | None


def diff(have: Tables, want: Tables) -> Iterator[Write]:
    """The writes of `runs`, one by one."""
    for run in runs(have, want):
        yield from (Write(run.table, key, value) for key, value in run.rows)
        yield from (Write(run.table, key, None) for key in run.gone)


def runs(have: Tables, want: Tables) -> Iterator[Run]:
    """The writes, in order, those to one table together. Equal tables give none."""
    return (run for run in _runs(have, want) if len(run))


def _runs(have: Tables, want: Tables) -> Iterator[Run]:
    yield _removed("services", have.services, want.services)
    now: Rows = []
    begin_draining: Rows = []
    for key, value in _changed(have.endpoints, want.endpoints):
        (begin_draining if key in have.endpoints and value[DRAINING] else now).append((key, value))
    yield Run("endpoints", now)
    yield Run("serving", _changed(have.serving, want.serving))
    shrunk, smaller = dict(have.policies), Rows()
    for key, value in _changed(have.policies, want.policies):
        if key in have.policies and (least := _smaller(have.policies[key], value)) != shrunk[key]:
            shrunk[key] = least
            smaller.append((key, least))
    yield Run("policies", smaller)
    yield Run("slots", _changed(have.slots, want.slots))
    yield Run("policies", _changed(shrunk, want.policies))
    yield Run("services", _changed(have.services, want.services))
    yield Run("endpoints", begin_draining)
    for table in REMOVED:
        yield _removed(table, getattr(have, table), getattr(want, table))


def _changed(old: Table, new: Table) -> Rows:
    if not old:
        return list(new.items())
    return [(key, value) for key, value in new.items() if old.get(key) != value]


def _removed(table: str, old: Table, new: Table) -> Run:
    return Run(table, gone=[key for key in old if key not in new])


def _smaller(old: bytes, new: bytes) -> bytes:
    """The old policy with no more slots than the new one has: what is left is named by both."""
    policy, other = abi.PolicyValue.from_buffer_copy(old), abi.PolicyValue.from_buffer_copy(new)
    policy.slots = min(policy.slots, other.slots)
    policy.slots4 = min(policy.slots4, other.slots4)
    if policy.pick == abi.Pick.HASH_OF_BOTH != other.pick:
        policy.pick = abi.Pick.HASH  # of what is left the three tables are no more to be told apart
    return bytes(policy)
