"""Leaves out of a mesh what the kernel's tables have no room for, so that no writer of a registry can stop everybody.

What files say comes first and is never left out here: files alone that do not fit are refused as a whole, by `plan`.
Then come endpoints that registries add to services of files, then services of registries, each by namespace and name;
whichever does not fit any more is left out alone. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from loader.plan import TABLES, sized_by
from loader.slots import slots_of
from meshbpf import changes
from meshbpf.model import EndpointState, LoadBalancer, MapSizes, Mesh, Protocol, Service, SessionAffinity
from meshbpf.registry.claims import Problem
from meshbpf.registry.instance import ServiceId

# Of one service of a registry: a hundred endpoints with the most uneven weights. A Maglev table is as large as its
# policy says, which no registry can write.
MAX_SLOTS = 10_000


@dataclass(slots=True)
class _Used:
    rows: Counter[str] = field(default_factory=Counter)
    endpoints: set[tuple[str, int]] = field(default_factory=set)

    def lack(
        self, service: Service, policy: LoadBalancer, sizes: MapSizes, most_slots: int, instead: Service | None = None
    ) -> str:
        """Why the service does not fit beside what is used (in which it may stand `instead` of another); empty when it
        fits, and then it is used.
        """
        rows, named = _rows(service, policy)
        rows["endpoints"] = len(named - self.endpoints)
        if rows["slots"] > most_slots and not policy.consistent_hash.use_source_ip:
            return f"needs {rows['slots']} slots, and a service of a registry may have {most_slots}"
        if instead is not None:
            rows.subtract(_rows(instead, policy)[0])
        for table in TABLES:
            if self.rows[table] + rows[table] > getattr(sizes, sized_by(table)):
                return f"does not fit into map {table}: raise Agent.spec.maps.{sized_by(table)}"
        self.rows.update(rows)
        self.endpoints |= named
        return ""


def _rows(service: Service, policy: LoadBalancer) -> tuple[Counter[str], set[tuple[str, int]]]:
    """How many rows of every table but `endpoints` it takes, and the endpoints that it names."""
    named: set[tuple[str, int]] = set()
    slots = serving = 0
    affinity = policy.session_affinity is SessionAffinity.CLIENT_IP
    for port in service.ports:
        name = port.name
        known = [endpoint for endpoint in service.endpoints if name in endpoint.ports]
        slots += slots_of([e for e in known if e.state is EndpointState.READY and e.weight > 0], policy)
        serving += len(known) if affinity or port.protocol is Protocol.UDP else 0
        named.update([(endpoint.address, endpoint.ports[name]) for endpoint in known])
    count = len(service.ports)
    rows = Counter(services=count * len(service.addresses), policies=count, slots=slots, serving=serving)
    return rows, named


class Fitter:
    """Fits mesh after mesh; counts again only what changed, and looks closely only when the sum of all is too much."""

    def __init__(self) -> None:
        self._last = Mesh()
        self._most: list[tuple[int, ...]] = []  # of its services

    def fit(self, mesh: Mesh, files: Sequence[Service], sizes: MapSizes, name: str) -> tuple[Mesh, list[Problem]]:
        """As `fit`; `files` are the services as the files, a source called `name`, have them."""
        self._count(mesh)
        sums = [sum(column) for column in zip(*self._most, strict=True)]
        if all(rows <= getattr(sizes, sized_by(table)) for table, rows in zip(TABLES, sums, strict=False)) and (
            max([most[TABLES.index("slots")] for most in self._most], default=0) <= MAX_SLOTS
        ):
            return mesh, []
        places = {endpoint.source for service in files for endpoint in service.endpoints} | {name}
        return fit(mesh, {service.id for service in files}, sizes, places)

    def _count(self, mesh: Mesh) -> None:
        last, self._last = self._last, mesh
        changed = changes.places(last, mesh)
        if changed is None:
            same = last.policies == mesh.policies
            known = dict(zip(map(id, last.services), self._most, strict=True)) if same else {}
            self._most = [
                known.get(id(service)) or _most(service, mesh.policy_for(service).load_balancer)
                for service in mesh.services
            ]
        for place in changed or ():
            service = mesh.services[place]
            self._most[place] = _most(service, mesh.policy_for(service).load_balancer)


def _most(service: Service, policy: LoadBalancer) -> tuple[int, ...]:
    """Rows of each of TABLES that the service takes when it shares nothing with others."""
    rows, named = _rows(service, policy)
    rows["endpoints"] = len(named)
    return tuple([rows[table] for table in TABLES])


def fit(
    mesh: Mesh, files: Container[ServiceId], sizes: MapSizes, own_sources: Container[str] = ("", "files")
) -> tuple[Mesh, list[Problem]]:
    """The mesh without what has no room, and what that is. `files`: the services that files name; `own_sources`: the
    sources (places in files) of the endpoints in them that are the files' own.
    """
    used, problems = _Used(), []

    def balance(service: Service) -> LoadBalancer:
        return mesh.policy_for(service).load_balancer

    kept: dict[ServiceId, Service] = {}
    named = sorted((service for service in mesh.services if service.id in files), key=lambda service: service.id)
    for service in named:
        kept[service.id] = replace(service, endpoints=tuple(e for e in service.endpoints if e.source in own_sources))
        if used.lack(kept[service.id], balance(service), sizes, sizes.slots):
            return mesh, []  # `plan` refuses it, and names the table
    rest = sorted((service for service in mesh.services if service.id not in files), key=lambda service: service.id)
    for service in named:
        own = kept[service.id]
        if len(own.endpoints) != len(service.endpoints):
            if why := used.lack(service, balance(service), sizes, MAX_SLOTS, instead=own):
                problems.append(Problem(service.label, "endpoints of registries", why))
            else:
                kept[service.id] = service
    for service in rest:
        if why := used.lack(service, balance(service), sizes, MAX_SLOTS):
            problems.append(Problem(service.label, "service", why))
        else:
            kept[service.id] = service
    if not problems:
        return mesh, []
    services = tuple(kept[service.id] for service in mesh.services if service.id in kept)
    return replace(mesh, services=services), problems
