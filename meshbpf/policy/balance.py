"""Which host serves next: pure choice over hosts prepared when the mesh was built. No clock, no dice, no I/O.

Chance comes as `rnd` (a number in [0, 1)). A balancer is built from the hosts that take new connections; when weights
or states change, build a new one. LEAST_REQUEST follows Envoy: the less busy of two draws while all weights are equal,
else a weighted schedule in which a host counts weight / (active + 1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import Generic, TypeVar

from meshbpf.model import Balance

Rnd = Callable[[], float]


class Host:
    """One endpoint of one service port. `active` is how many requests or connections it serves now."""

    __slots__ = ("active", "address", "draining", "port", "weight")

    def __init__(self, address: str, port: int, weight: int = 100, draining: bool = False) -> None:
        self.address = address
        self.port = port
        self.weight = weight
        self.draining = draining
        self.active = 0

    def __repr__(self) -> str:
        return f"Host({self.address}:{self.port} weight={self.weight} active={self.active})"


H = TypeVar("H", bound=Host)


class Balancer(Generic[H]):
    """`pick` gives a host other than `exclude`, or None when there is none. This one has no hosts at all."""

    __slots__ = ("hosts",)

    def __init__(self, hosts: Sequence[H]) -> None:
        self.hosts = hosts

    def pick(self, rnd: Rnd, exclude: H | None = None) -> H | None:
        del rnd, exclude
        return None


class Single(Balancer[H]):
    """The most frequent case: nothing to choose."""

    __slots__ = ()

    def pick(self, rnd: Rnd, exclude: H | None = None) -> H | None:
        host = self.hosts[0]
        return None if host is exclude else host


class TwoChoices(Balancer[H]):
    """Two different hosts drawn, the one with fewer active requests taken. For equal weights."""

    __slots__ = ()

    def pick(self, rnd: Rnd, exclude: H | None = None) -> H | None:
        hosts: Sequence[H] = self.hosts
        if exclude is not None:
            hosts = [host for host in hosts if host is not exclude]
            if not hosts:
                return None
        count = len(hosts)
        if count == 1:
            return hosts[0]
        first = int(rnd() * count)
        second = int(rnd() * (count - 1))
        if second >= first:
            second += 1
        one, other = hosts[first], hosts[second]
        return other if other.active < one.active else one


class Rotation(Balancer[H]):
    """One after the other, from a random start so that workers do not march in step. For equal weights."""

    __slots__ = ("_next",)

    def __init__(self, hosts: Sequence[H]) -> None:
        super().__init__(hosts)
        self._next = -1

    def pick(self, rnd: Rnd, exclude: H | None = None) -> H | None:
        hosts = self.hosts
        if self._next < 0:
            self._next = int(rnd() * len(hosts))
        for _ in range(2):
            host = hosts[self._next]
            self._next += 1
            if self._next == len(hosts):
                self._next = 0
            if host is not exclude:
                return host
        return None


class Schedule(Balancer[H]):
    """Earliest deadline first: a host is due again after 1 / weight. Smooth: the heavy ones are spread over the round.

    `by_load` divides the weight by active + 1 at the moment of the pick (LEAST_REQUEST with unequal weights).
    """

    __slots__ = ("_by_load", "_heap")

    def __init__(self, hosts: Sequence[H], by_load: bool) -> None:
        super().__init__(hosts)
        self._by_load = by_load
        self._heap: list[tuple[float, int, H]] = []

    def pick(self, rnd: Rnd, exclude: H | None = None) -> H | None:
        heap = self._heap
        if not heap:
            # All start somewhere within their first period, so that workers do not march in step.
            heap.extend((rnd() / host.weight, order, host) for order, host in enumerate(self.hosts))
            heapify(heap)
        due, order, host = heappop(heap)
        if host is exclude:
            if not heap:
                heappush(heap, (due, order, host))
                return None
            passed = (due, order, host)
            due, order, host = heappop(heap)
            heappush(heap, passed)
        load = host.active + 1 if self._by_load else 1
        heappush(heap, (due + load / host.weight, order, host))
        return host


class Draw(Balancer[H]):
    """A weighted draw."""

    __slots__ = ("_sums",)

    def __init__(self, hosts: Sequence[H]) -> None:
        super().__init__(hosts)
        self._sums = list(accumulate(host.weight for host in hosts))

    def pick(self, rnd: Rnd, exclude: H | None = None) -> H | None:
        if exclude is not None and exclude in self.hosts:
            rest = [host for host in self.hosts if host is not exclude]
            return Draw(rest).pick(rnd) if rest else None
        sums = self._sums
        return self.hosts[bisect_right(sums, rnd() * sums[-1])]


def balancer(kind: Balance, hosts: Iterable[H]) -> Balancer[H]:
    """The balancer for `kind` over those `hosts` that take new connections (weight above 0, not draining)."""
    usable = [host for host in hosts if host.weight > 0 and not host.draining]
    if not usable:
        return Balancer(usable)
    if len(usable) == 1:
        return Single(usable)
    if kind is Balance.RANDOM:
        return Draw(usable)
    if len({host.weight for host in usable}) > 1:
        return Schedule(usable, by_load=kind is Balance.LEAST_REQUEST)
    return Rotation(usable) if kind is Balance.ROUND_ROBIN else TwoChoices(usable)
