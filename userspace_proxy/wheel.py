"""All timeouts of one worker on one timer: items stand in buckets of a tick, and a later deadline costs nothing.

An item stands in at most one bucket, at or before its deadline. `at` only moves it when the new deadline is earlier;
when its bucket comes up, an item whose deadline has moved on is put into a later one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import Protocol


class Timed(Protocol):
    """Something that ends. `due` is the wheel's own (begin with inf); `expired` gives the next deadline or inf."""

    deadline: float
    due: float

    def expired(self, now: float) -> float: ...


class Wheel:
    __slots__ = ("_armed", "_buckets", "_clock", "_handle", "_loop", "_tick")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float], tick: float) -> None:
        self._loop = loop
        self._clock = clock
        self._tick = tick
        self._buckets: dict[float, set[Timed]] = {}
        self._armed = inf
        self._handle: asyncio.TimerHandle | None = None

    def at(self, item: Timed, deadline: float) -> None:
        """Let `item` expire at `deadline`, at most a tick later."""
        item.deadline = deadline
        if deadline < item.due:
            self._put(item, deadline)

    def drop(self, item: Timed) -> None:
        """Forget `item`, which has ended."""
        bucket = self._buckets.get(item.due)
        if bucket is not None:
            bucket.discard(item)
        item.due = inf

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._buckets.clear()

    def _put(self, item: Timed, deadline: float) -> None:
        self.drop(item)
        due = item.due = deadline // self._tick * self._tick
        bucket = self._buckets.get(due)
        if bucket is None:
            bucket = self._buckets[due] = set()
        bucket.add(item)
        if due < self._armed:
            self._arm(due)

    def _arm(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._armed = due
        self._handle = self._loop.call_later(max(0.0, due + self._tick - self._clock()), self._turn)

    def _turn(self) -> None:
        self._handle = None
        self._armed = inf
        now = self._clock()
        for due in sorted(due for due in self._buckets if due + self._tick <= now):
            for item in self._buckets.pop(due):
                if item.due != due:
                    continue  # dropped by an item that expired just before it
                item.due = inf
                deadline = item.deadline if item.deadline > now else item.expired(now)
                if deadline != inf:
                    self.at(item, deadline)
        self._buckets = {due: bucket for due, bucket in self._buckets.items() if bucket}
        if self._buckets and (first := min(self._buckets)) < self._armed:
            self._arm(first)
