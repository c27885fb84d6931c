"""Who is registered, and until when. Pure: time comes as an argument, nothing is read or written.

One lease per (service, id). A lease ends when `now` reaches its deadline, which every PUT and heartbeat moves to
`now + ttl`; an ended lease does not come back by a heartbeat (the caller is told and registers again), because whoever
acted on its end must be able to rely on it.

Generations count changes that a reader can see, so neither a heartbeat nor an unchanged PUT moves them. A service's
generation is the global one at its last change; it stays known after its last instance went, so that a reader who
waits for a change learns of the end.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from meshbpf.registry.instance import Instance, Refusal, ServiceId

MAX_PER_SERVICE = 1_000
MAX_TOTAL = 10_000
MAX_GENERATION = 2**53  # whole numbers beyond it are not the same in every JSON reader
MAX_GONE = 10_000  # ended services whose generation is remembered
MIN_GRACE = 10.0

Key = tuple[str, str, str]  # (name, namespace, id)


@dataclass(frozen=True, slots=True)
class Lease:
    instance: Instance
    deadline: float
    order: int  # who was first: where instances contradict each other, the oldest is right


@dataclass(frozen=True, slots=True)
class Put:
    """What a PUT did: `created` decides between 201 and 200, `changed` whether readers are told."""

    lease: Lease
    created: bool
    changed: bool


@dataclass(frozen=True, slots=True)
class NoRoom(Refusal):
    """The instance is fine, the registry is full: trying again later may help."""


def remaining_after_restart(instance: Instance, deadline: float, wall: float) -> float:
    """How long a stored lease runs on when the registry starts at `wall`: at most its TTL, at least `grace`. The cap
    covers a wall clock that went backwards.
    """
    return min(instance.ttl, max(deadline - wall, grace(instance)))


def grace(instance: Instance) -> float:
    """How long an instance stays, although the registry has not heard of it since the registry came back.

    While the registry was away nobody could renew, so an overdue deadline says nothing about the instance, and dropping
    a healthy one costs requests where keeping a dead one only costs a retry. The grace is half the TTL (clients
    heartbeat every third of it), at least 10 s because clients back off while the registry is away, at most the TTL.
    It is not always the full TTL, else a dead instance of a long TTL would outlive any number of restarts.
    """
    return min(instance.ttl, max(instance.ttl / 2, MIN_GRACE))


class Leases:
    """The live leases and the generations."""

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        self._leases: dict[Key, Lease] = {}
        self._services: dict[ServiceId, dict[str, Lease]] = {}
        self._generations: dict[ServiceId, int] = {}
        self._gone: OrderedDict[ServiceId, int] = OrderedDict()
        self._order = 0
        # `_due` is the time of a lease's one valid entry in the heap, never later than its deadline: a renewal leaves
        # it alone, and an entry that comes up too early is put back. So a heartbeat costs O(1).
        self._heap: list[tuple[float, Key]] = []
        self._due: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, service: ServiceId, id: str) -> Lease | None:
        return self._leases.get((*service, id))

    def services(self) -> list[ServiceId]:
        return sorted(self._services, key=lambda service: (service[1], service[0]))

    def of(self, service: ServiceId) -> list[Lease]:
        """The leases of a service, oldest first."""
        return sorted(self._services.get(service, {}).values(), key=lambda lease: lease.order)

    def generation_of(self, service: ServiceId) -> int:
        """0 for a service never seen."""
        return self._generations.get(service, self._gone.get(service, 0))

    def put(self, instance: Instance, now: float) -> Put | NoRoom:
        """Register or renew."""
        old = self._leases.get(instance.key)
        if old is None:
            if len(self._services.get(instance.service, ())) >= MAX_PER_SERVICE:
                return NoRoom("service", f"already has {MAX_PER_SERVICE} instances")
            if len(self._leases) >= MAX_TOTAL:
                return NoRoom("service", f"the registry already holds {MAX_TOTAL} instances")
        changed = old is None or old.instance != instance
        lease = self._set(instance, now + instance.ttl, old)
        if changed:
            self._touch(instance.service)
        return Put(lease, old is None, changed)

    def heartbeat(self, service: ServiceId, id: str, now: float) -> Lease | None:
        """The renewed lease; None when it ended, even if `expire` has not been asked yet."""
        lease = self._leases.get((*service, id))
        if lease is None or lease.deadline <= now:
            return None
        return self._set(lease.instance, now + lease.instance.ttl, lease)

    def delete(self, service: ServiceId, id: str) -> Lease | None:
        """The lease that was ended; None when there was none."""
        lease = self._drop((*service, id))
        if lease is not None:
            self._touch(service)
        return lease

    def expire(self, now: float) -> tuple[Instance, ...]:
        """End every lease whose deadline has come; each service that lost one changes once."""
        ended: list[Instance] = []
        while (deadline := self.deadline()) is not None and deadline <= now:
            lease = self._drop(heapq.heappop(self._heap)[1])
            if lease is not None:
                ended.append(lease.instance)
        for service in dict.fromkeys(instance.service for instance in ended):
            self._touch(service)
        return tuple(ended)

    def deadline(self) -> float | None:
        """When `expire` next has something to do."""
        while self._heap:
            at, key = self._heap[0]
            if self._due.get(key) != at:  # the lease is gone, or has an earlier entry since its TTL became shorter
                heapq.heappop(self._heap)
            elif (deadline := self._leases[key].deadline) > at:
                heapq.heapreplace(self._heap, (deadline, key))
                self._due[key] = deadline
            else:
                return at
        return None

    def restore(self, stored: Iterable[tuple[Instance, float]], now: float) -> None:
        """Take back (instance, remaining seconds) after a restart, oldest first; one change for all of them."""
        for instance, remaining in stored:
            self._set(instance, now + remaining, None)
        self.generation += 1
        for service in self._services:
            self._generations[service] = self.generation

    def _set(self, instance: Instance, deadline: float, old: Lease | None) -> Lease:
        if old is None:
            self._order += 1
        lease = Lease(instance, deadline, old.order if old else self._order)
        self._leases[instance.key] = lease
        self._services.setdefault(instance.service, {})[instance.id] = lease
        due = self._due.get(instance.key)
        if due is None or deadline < due:  # new, or a shorter TTL: the entry in the heap would be too late
            self._due[instance.key] = deadline
            heapq.heappush(self._heap, (deadline, instance.key))
            if len(self._heap) > 2 * len(self._leases) + 64:  # nobody may pile up outdated entries of far deadlines
                self._heap = [(at, key) for key, at in self._due.items()]
                heapq.heapify(self._heap)
        return lease

    def _drop(self, key: Key) -> Lease | None:
        lease = self._leases.pop(key, None)
        if lease is None:
            return None
        self._due.pop(key, None)
        service = lease.instance.service
        instances = self._services[service]
        del instances[lease.instance.id]
        if not instances:
            del self._services[service]
        return lease

    def _touch(self, service: ServiceId) -> None:
        self.generation += 1
        if service in self._services:
            self._generations[service] = self.generation
            self._gone.pop(service, None)
            return
        self._generations.pop(service, None)
        self._gone[service] = self.generation
        self._gone.move_to_end(service)
        while len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)
