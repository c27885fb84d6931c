"""What an address of the mesh leads to: routes and targets, prepared when a mesh arrives. No sockets here.

A Route is one port of one service. Routes and targets live on by identity when the mesh changes: their counts, pools
and schedules are those of before, and whoever holds one sees the new policy with the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING

from meshbpf.model import DEFAULT_POLICY, Acceleration, EndpointState, Mesh, Port, Protocol, Service, ServicePolicy
from meshbpf.policy.balance import Balancer, Host, balancer
from userspace_proxy.stats import endpoint_label

if TYPE_CHECKING:
    from userspace_proxy.head import RequestFields
    from userspace_proxy.pool import Pool
    from userspace_proxy.upstream import Upstream


class Target(Host):
    """An endpoint as the proxy uses it. `idle`: connections that wait for a request, by namespace, newest last."""

    __slots__ = ("gone", "idle", "label")

    def __init__(self, address: str, port: int) -> None:
        super().__init__(address, port)
        self.label = endpoint_label(address, port)
        self.idle: dict[int, list[Upstream]] = {}
        self.gone = False  # left the mesh: what it serves now is its last


class Route:
    """One port of one service. `service` is its label; `in_flight` the cell of a gauge."""

    __slots__ = (
        "accelerated", "addresses", "balancer", "dialled", "heads", "in_flight", "per_try", "policy", "pool", "port",
        "protocol", "request", "retired", "service", "source", "targets",
    )  # fmt: skip

    def __init__(self, service: str, port: Port, pool: Callable[[Route], Pool], in_flight: list[int]) -> None:
        self.service = service
        self.port = port
        self.protocol = port.protocol
        self.policy: ServicePolicy = DEFAULT_POLICY
        self.source: Service | None = None
        self.targets: tuple[Target, ...] = ()
        self.addresses: tuple[str, ...] = ()
        self.balancer: Balancer[Target] = balancer(DEFAULT_POLICY.load_balancer.simple, ())
        self.in_flight = in_flight
        self.accelerated = True
        self.retired = False  # left the mesh: look up anew what was dialled
        self.request = 0.0
        self.per_try = 0.0
        self.dialled = f"{service}:{port.port}".encode()
        self.heads: dict[bytes, RequestFields] = {}  # header lines → what was read from them
        self.pool = pool(self)

    def update(self, service: Service, port: Port, policy: ServicePolicy, targets: tuple[Target, ...]) -> None:
        """Follow a new mesh. The balancer keeps its place in the round when nothing about the hosts changed."""
        same = self.source == service and self.policy.load_balancer == policy.load_balancer
        self.port = port
        self.protocol = port.protocol
        self.policy = policy
        self.source = service
        self.accelerated = policy.acceleration is not Acceleration.OFF
        self.request = policy.timeouts.request
        self.per_try = policy.timeouts.per_try
        if not same:
            self.targets = targets
            self.balancer = balancer(policy.load_balancer.simple, targets)
        self.pool.follow(policy)

    @property
    def http(self) -> bool:
        return self.protocol is Protocol.HTTP

    def balancer_for(self, server_name: str | None) -> Balancer[Target]:
        """Who picks the endpoint of a connection that asks for `server_name`: the one place for TLSRoutes to choose."""
        del server_name
        return self.balancer


def canonical(address: str) -> str:
    """One spelling per address, that of the kernel's tables; IPv4 has only one."""
    return address if ":" not in address else ip_address(address).compressed


class Table:
    """All routes, by identity and by the address that applications dial."""

    __slots__ = ("_in_flight", "_pool", "_routes", "by_address")

    def __init__(self, pool: Callable[[Route], Pool], in_flight: Callable[[str], list[int]]) -> None:
        self._pool = pool
        self._in_flight = in_flight
        self._routes: dict[tuple[str, str, int], Route] = {}
        self.by_address: dict[tuple[str, int], Route] = {}

    def use(self, mesh: Mesh) -> list[Target]:
        """Follow `mesh`; returns the targets that left it. New connections see all of it or nothing of it.

        A service and policy that are the same objects as before are passed over.
        """
        routes: dict[tuple[str, str, int], Route] = {}
        by_address: dict[tuple[str, int], Route] = {}
        left: list[Target] = []
        for service in mesh.services:
            policy = mesh.policy_for(service)
            for port in service.ports:
                if port.protocol is Protocol.UDP:
                    continue
                key = (*service.id, port.port)
                route = self._routes.get(key)
                if route is None:
                    route = Route(service.label, port, self._pool, self._in_flight(service.label))
                routes[key] = route
                if route.source is not service or route.policy is not policy:
                    left += _follow(route, service, port, policy)
                for address in route.addresses:
                    by_address[(address, port.port)] = route
        for key, route in self._routes.items():
            if key not in routes:
                route.retired = True
                left += route.targets
                route.targets = ()
                route.balancer = balancer(DEFAULT_POLICY.load_balancer.simple, ())
        for target in left:
            target.gone = True
        self._routes, self.by_address = routes, by_address
        return left

    def targets(self) -> Iterable[Target]:
        return (target for route in self._routes.values() for target in route.targets)


def _follow(route: Route, service: Service, port: Port, policy: ServicePolicy) -> list[Target]:
    """Update the route; returns the targets that are no longer its own."""
    known = {(target.address, target.port): target for target in route.targets}
    kept: dict[tuple[str, int], Target] = {}
    found = []
    for endpoint in service.endpoints:
        number = endpoint.ports.get(port.name)
        if number is None:
            continue
        place = (canonical(endpoint.address), number)
        target = kept.get(place) or known.get(place) or Target(*place)
        target.weight = endpoint.weight
        target.draining = endpoint.state is EndpointState.DRAINING
        target.gone = False
        kept[place] = target
        found.append(target)
    route.addresses = tuple(canonical(address) for address in service.addresses)
    route.update(service, port, policy, tuple(found))
    return [target for place, target in known.items() if place not in kept]
