"""The wheel: nothing expires early, nothing later than a tick, and what moved on or ended costs nothing."""

from __future__ import annotations

import asyncio
from math import inf

from userspace_proxy.wheel import Wheel


class Item:
    def __init__(self, again: float = inf) -> None:
        self.deadline = self.due = inf
        self.expired_at: list[float] = []
        self._again = again

    def expired(self, now: float) -> float:
        self.expired_at.append(now)
        return now + self._again


class Loop:
    """A loop whose time is turned by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, object, Handle]] = []

    def call_later(self, delay: float, callback: object) -> Handle:
        handle = Handle()
        self.timers.append((self.now + delay, callback, handle))
        return handle

    def turn(self, until: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= until and not timer[2].gone]:
            first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            self.now = max(self.now, first[0])
            first[1]()  # type: ignore[operator]
        self.now = until


class Handle:
    def __init__(self) -> None:
        self.gone = False

    def cancel(self) -> None:
        self.gone = True


def wheel() -> tuple[Loop, Wheel]:
    loop = Loop()
    as_loop: asyncio.AbstractEventLoop = loop  # type: ignore[assignment]
    return loop, Wheel(as_loop, lambda: loop.now, 0.1)


def test_an_item_expires_once_and_at_most_a_tick_late() -> None:
    loop, turning = wheel()
    item = Item()
    turning.at(item, 101.23)
    loop.turn(101.22)
    assert item.expired_at == []
    loop.turn(105.0)
    assert len(item.expired_at) == 1 and 101.23 <= item.expired_at[0] <= 101.23 + 0.11


def test_a_later_deadline_wins_and_an_earlier_one_too() -> None:
    loop, turning = wheel()
    later, earlier = Item(), Item()
    turning.at(later, 101.0)
    turning.at(later, 103.0)
    turning.at(earlier, 103.0)
    turning.at(earlier, 101.0)
    loop.turn(102.0)
    assert later.expired_at == [] and len(earlier.expired_at) == 1
    loop.turn(104.0)
    assert len(later.expired_at) == 1 and len(earlier.expired_at) == 1


def test_a_dropped_item_never_expires() -> None:
    loop, turning = wheel()
    item = Item()
    turning.at(item, 101.0)
    turning.drop(item)
    loop.turn(110.0)
    assert item.expired_at == [] and item.due == inf


def test_an_item_may_go_on() -> None:
    loop, turning = wheel()
    item = Item(again=1.0)
    turning.at(item, 101.0)
    loop.turn(105.0)
    assert 4 <= len(item.expired_at) <= 5


def test_an_item_that_ends_another_one_in_the_same_tick() -> None:
    loop, turning = wheel()
    one, other = Item(), Item()

    class Killer(Item):
        def expired(self, now: float) -> float:
            for each in (one, other):
                turning.drop(each)
            return super().expired(now)

    killers = [Killer(), Killer()]
    for each in (killers[0], one, other, killers[1]):
        turning.at(each, 101.0)
    loop.turn(102.0)
    assert len(one.expired_at) <= 1 and len(other.expired_at) <= 1
    assert all(len(killer.expired_at) == 1 for killer in killers)


def test_no_timer_runs_when_nothing_waits() -> None:
    loop, turning = wheel()
    item = Item()
    turning.at(item, 101.0)
    loop.turn(110.0)
    assert not [timer for timer in loop.timers if not timer[2].gone]
