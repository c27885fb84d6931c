"""All relays of one loop: one coarse sweep finds those that are idle, and a drain ends all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from meshbpf.reason import Reason

if TYPE_CHECKING:
    from userspace_proxy.tcp import Relay

SWEEP_EVERY = 1.0


class Relays:
    """All relays of one loop, for the sweep and the drain."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_later, self._time = loop.call_later, loop.time  # not the loop: it is the weak key of _of_loop
        self._relays: set[Relay] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._relays)

    def add(self, relay: Relay) -> None:
        self._relays.add(relay)
        if self._timer is None:
            self._timer = self._call_later(SWEEP_EVERY, self._sweep)

    def discard(self, relay: Relay) -> None:
        self._relays.discard(relay)

    def tick(self, now: float) -> None:
        """Close what is idle, or silent where it should greet. Coarse: up to SWEEP_EVERY late, never early."""
        for relay in list(self._relays):
            if (reason := relay.late(now)) is not None:
                relay.close(reason)

    def close(self, reason: Reason = Reason.DRAINING) -> None:
        for relay in list(self._relays):
            relay.close(reason)

    def _sweep(self) -> None:
        self._timer = self._call_later(SWEEP_EVERY, self._sweep) if self._relays else None
        self.tick(self._time())


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Relays] = WeakKeyDictionary()


def relays_of(loop: asyncio.AbstractEventLoop) -> Relays:
    relays = _of_loop.get(loop)
    if relays is None:
        relays = _of_loop[loop] = Relays(loop)
    return relays
