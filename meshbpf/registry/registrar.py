"""The live registry: leases, their store, one timer for the next expiry, and those who wait for a change.

The shell around `leases` (which decides) and `store` (which remembers): it owns the clock, and it alone may change the
leases. A change is visible to readers at once and answered when it is durable; `durable=False` in an answer means that
the store is in trouble (`problem`) and a restart would lose the change.

A heartbeat is stored as well, so that a restart knows how much of a long lease is left; heartbeats that arrive while
the disk is busy share one transaction.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from meshbpf.registry import instance as instances
from meshbpf.registry.content import Change, Count, Drop, PutRow, Renew
from meshbpf.registry.instance import Instance, Refusal, Rules, ServiceId
from meshbpf.registry.leases import Lease, Leases, remaining_after_restart
from meshbpf.registry.store import Store

log = logging.getLogger("registry")


@dataclass(frozen=True, slots=True)
class Written:
    lease: Lease
    created: bool
    durable: bool


class Registrar:
    """`start`, then everything else, then `close`. `rules` may be replaced at any time; it judges later writes."""

    def __init__(
        self,
        store: Store,
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.rules = rules
        self.leases = Leases()
        self.news = asyncio.Event()  # set when the leases or `problem` changed; its one reader clears it
        self.waiting = 0  # how many `wait` right now
        self._clock, self._wall = clock, wall
        self._waiters: dict[ServiceId | None, set[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._told_problem = ""
        self._closed = False

    @property
    def problem(self) -> str:
        """Why registrations would not survive a restart; empty when they would."""
        return self.store.problem

    @property
    def now(self) -> float:
        return self._clock()

    async def start(self) -> None:
        content = await self.store.open()
        now, wall = self._clock(), self._wall()
        # What is stored was judged when it came in; which loopback addresses were allowed depended on the listener.
        rules = replace(self.rules, allow_loopback=True)
        restored: list[tuple[Instance, float]] = []
        dropped: list[Change] = []
        for key, (body, deadline) in content.instances.items():
            instance = _stored(key, body, rules)
            if isinstance(instance, Refusal):
                log.warning("stored instance dropped key=%s field=%s: %s", key, instance.field, instance.message)
                dropped.append(Drop(key))
            else:
                restored.append((instance, remaining_after_restart(instance, deadline, wall)))
        self.leases = Leases(content.generation)
        self.leases.restore(restored, now)
        self.store.send([*dropped, Count(self.leases.generation)])
        self._changed(self.leases.services())
        self._arm()

    async def close(self) -> None:
        """Let waiters go, stop the timer, write what is queued. The instances stay in the store."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for key in list(self._waiters):
            self._wake(key)
        await self.store.close()

    async def put(self, service: str, id: str, body: object, local: bool) -> Written | Refusal:
        """Register or renew. `local`: who asks is on this machine, so loopback addresses mean the same to both."""
        rules = replace(self.rules, allow_loopback=True) if local else self.rules
        instance = instances.parse(service, id, body, rules)
        if isinstance(instance, Refusal):
            return instance
        self._expire()  # a timer may be late; who ended must not be renewed
        put = self.leases.put(instance, self._clock())
        if isinstance(put, Refusal):
            return put
        deadline = self._wall() + instance.ttl
        self._arm()
        if not put.changed:
            return Written(put.lease, False, await self._write([Renew(instance.key, deadline)]))
        self._changed([instance.service])
        row = PutRow(instance.key, json.dumps(instance.body()), deadline)
        return Written(put.lease, put.created, await self._write([row, Count(self.leases.generation)]))

    async def heartbeat(self, service: ServiceId, id: str) -> bool:
        """Renew; False when the lease has ended: register again."""
        lease = self.leases.heartbeat(service, id, self._clock())
        if lease is None:
            return False
        await self._write([Renew(lease.instance.key, self._wall() + lease.instance.ttl)])
        return True

    async def delete(self, service: ServiceId, id: str) -> bool:
        """End the lease; False when there was none."""
        self._expire()
        lease = self.leases.delete(service, id)
        if lease is None:
            return False
        self._changed([service])
        await self._write([Drop(lease.instance.key), Count(self.leases.generation)])
        return True

    def generation(self, service: ServiceId | None) -> int:
        """Of one service, or of everything."""
        return self.leases.generation if service is None else self.leases.generation_of(service)

    async def wait(self, service: ServiceId | None, generation: int, seconds: float) -> None:
        """Return when the generation is another one than `generation`, after `seconds`, or when the registry closes.

        Another one, not a later one: a reader who knows more than a registry that lost its store must not wait.
        """
        if self._closed or self.generation(service) != generation:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(service, set()).add(waiter)
        self.waiting += 1
        try:
            await asyncio.wait([waiter], timeout=seconds)
        finally:
            self.waiting -= 1
            others = self._waiters.get(service)
            if others is not None:
                others.discard(waiter)
                if not others:
                    del self._waiters[service]

    async def _write(self, changes: list[Change]) -> bool:
        durable = await self.store.write(changes)
        if self.problem != self._told_problem:
            self._told_problem = self.problem
            self.news.set()
        return durable

    def _changed(self, services: Iterable[ServiceId]) -> None:
        for service in services:
            self._wake(service)
        self._wake(None)
        self.news.set()

    def _wake(self, key: ServiceId | None) -> None:
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    def _expire(self) -> None:
        ended = self.leases.expire(self._clock())
        if not ended:
            return
        for instance in ended:
            log.info("lease ended service=%s id=%s", ".".join(instance.service), instance.id)
        self._changed(dict.fromkeys(instance.service for instance in ended))
        # Not awaited: should this be lost, the instance comes back after a restart for one grace and ends again.
        self.store.send([*(Drop(instance.key) for instance in ended), Count(self.leases.generation)])

    def _arm(self) -> None:
        """Have the timer run at the next deadline. A timer that comes too early (after a renewal) only arms again."""
        deadline = self.leases.deadline()
        if deadline is None or self._closed:
            return
        loop = asyncio.get_running_loop()
        # A millisecond more: event loops round, and a timer just before the deadline would spin.
        when = loop.time() + max(0.0, deadline - self._clock()) + 0.001
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._expire()
        self._arm()


def _stored(key: tuple[str, str, str], body: str, rules: Rules) -> Instance | Refusal:
    name, namespace, id = key
    try:
        value = json.loads(body)
    except ValueError as error:
        return Refusal("", str(error))
    return instances.parse(f"{name}.{namespace}", id, value, rules)
