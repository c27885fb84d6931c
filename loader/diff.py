"""Have, want → ordered writes that never misroute a connect() running between two of them. Pure.

The order: what is pointed at comes before what points at it, and goes after it. So addresses that are no service any
more go first; endpoints, slots, policies (which say how many slots count) and services are added in that order and
removed in the reverse one. A service whose slots shrink first gets the smaller count, then other slots; one that grows
first gets the slots, then the count. An endpoint that drains is told so when no slot names it any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loader import abi
from loader.plan import Table, Tables

REMOVED = ("policies", "slots", "endpoints")
DRAINING = abi.EndpointValue.draining.offset


@dataclass(frozen=True, slots=True)
class Write:
    """Set `key` of `table` to `value`, or delete it when `value` is None."""

    table: str
    key: bytes
    value: bytes | None


def diff(have: Tables, want: Tables) -> Iterator[Write]:
    """The writes, in order. Equal tables give none."""
    yield from _removed("services", have.services, want.services)
    begin_draining = []
    for write in _changed("endpoints", have.endpoints, want.endpoints):
        if write.key in have.endpoints and write.value is not None and write.value[DRAINING]:
            begin_draining.append(write)
        else:
            yield write
    shrunk = dict(have.policies)
    for write in _changed("policies", have.policies, want.policies):
        if write.key in have.policies and write.value is not None:
            smaller = _smaller(have.policies[write.key], write.value)
            if smaller != shrunk[write.key]:
                shrunk[write.key] = smaller
                yield Write("policies", write.key, smaller)
    yield from _changed("slots", have.slots, want.slots)
    yield from _changed("policies", shrunk, want.policies)
    yield from _changed("services", have.services, want.services)
    yield from begin_draining
    for table in REMOVED:
        yield from _removed(table, getattr(have, table), getattr(want, table))


def _changed(table: str, old: Table, new: Table) -> Iterator[Write]:
    return (Write(table, key, value) for key, value in new.items() if old.get(key) != value)


def _removed(table: str, old: Table, new: Table) -> Iterator[Write]:
    return (Write(table, key, None) for key in old if key not in new)


def _smaller(old: bytes, new: bytes) -> bytes:
    """The old policy with no more slots than the new one has: what is left is named by both."""
    policy, other = abi.PolicyValue.from_buffer_copy(old), abi.PolicyValue.from_buffer_copy(new)
    policy.slots = min(policy.slots, other.slots)
    policy.slots4 = min(policy.slots4, other.slots4)
    return bytes(policy)
