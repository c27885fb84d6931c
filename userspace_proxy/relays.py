"""All relays of one loop: one coarse sweep finds those that are idle, and a drain ends all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from meshbpf.reason import Reason
from userspace_proxy.limits import DEFAULT_LIMITS
from userspace_proxy.wire import waiting

if TYPE_CHECKING:
    from userspace_proxy.tcp import Relay

SWEEP_EVERY = 1.0
FLUSH, HELLO_TIMEOUT = DEFAULT_LIMITS.flush, DEFAULT_LIMITS.hello_timeout


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
            if (reason := late(relay, now)) is not None:
                relay.close(reason)

    def close(self, reason: Reason = Reason.DRAINING) -> None:
        for relay in list(self._relays):
            relay.close(reason)

    def _sweep(self) -> None:
        self._timer = self._call_later(SWEEP_EVERY, self._sweep) if self._relays else None
        self.tick(self._time())


def late(relay: Relay, now: float) -> Reason | None:
    """Why this is to be ended at the sweep of `now`, if it is."""
    if relay.greeting:
        return Reason.HELLO_TIMEOUT if now - relay.quiet_since >= HELLO_TIMEOUT else None
    at = _progress(relay)
    if at != relay.seen or relay.dialling:
        relay.seen, relay.quiet_since = at, now
    elif (idle := _idle_timeout(relay)) and now - relay.quiet_since >= idle:
        return Reason.IDLE_TIMEOUT
    return None


def _progress(relay: Relay) -> tuple[int, int]:
    """All bytes that came, and those that are still to be sent."""
    unsent = [waiting(side.transport) for side in (relay.down, relay.up) if side.transport is not None]
    return relay.down.received + relay.up.received, sum(unsent)


def _idle_timeout(relay: Relay) -> float:
    """How long nothing may move; 0: for ever, which what is only to be sent may not."""
    idle = relay.policy.connection_pool.tcp.idle_timeout
    transports = (relay.down.transport, relay.up.transport)
    if all(transport is not None and transport.is_closing() for transport in transports):
        return min(idle, FLUSH) if idle else FLUSH
    return idle


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Relays] = WeakKeyDictionary()


def relays_of(loop: asyncio.AbstractEventLoop) -> Relays:
    relays = _of_loop.get(loop)
    if relays is None:
        relays = _of_loop[loop] = Relays(loop)
    return relays
