"""Several sources to one mesh. Pure: snapshots in order of precedence come in (files first), a mesh comes out.

Rules, per service: addresses, ports and labels are the first source's that has them; endpoints are united, and the same
endpoint in two sources is the earlier one's. What a registry says is not trusted like a file: an endpoint or address
that would loop, collide or reach our own ports is left out and reported, and everything else goes on.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from meshbpf.model import Agent, Endpoint, Mesh, Port, Protocol, Service, ServicePolicy
from meshbpf.registry import pool
from meshbpf.registry.base import Snapshot
from meshbpf.registry.instance import IPNetwork, ServiceId
from meshbpf.schema import addresses

Taken = dict[tuple[str, str, int], str]  # (address, tcp or udp, port) → label of the service


class Problem(NamedTuple):
    """Something left out of the mesh: of which service, what (an address, a port or an endpoint), and why."""

    service: str
    what: str
    why: str


class Merged(NamedTuple):
    """`given` is the address of every service that the pool serves, to be passed in again next time."""

    mesh: Mesh
    problems: tuple[Problem, ...]
    given: Mapping[ServiceId, str]


class Wanted(NamedTuple):
    """What a store of given addresses is asked for: addresses for `services`, from `pool`, none of `avoid`."""

    services: tuple[ServiceId, ...]
    pool: IPNetwork
    avoid: frozenset[str]


@dataclass(slots=True)
class _Draft:
    """A service while sources add to it. `rank` is the source that addresses it; endpoints keep whether they may be
    on loopback."""

    service: Service
    rank: int
    endpoints: list[tuple[Endpoint, bool]] = field(default_factory=list)


def mesh(snapshots: Sequence[Snapshot], given: Mapping[ServiceId, str], generation: int = 0) -> Merged:
    """The mesh of all snapshots; `given` holds the addresses which the pool gave before: they stay."""
    agent = _agent(snapshots)
    problems: list[Problem] = []
    drafts = _drafts(snapshots)
    _keep_addresses(drafts, agent, problems)
    new = _give_addresses(drafts, agent, given, problems)
    taken = _taken(drafts)
    services = tuple(_finished(draft, agent, taken, problems) for draft in drafts)
    return Merged(Mesh(agent, services, policies(snapshots), generation), tuple(problems), new)


def wanted(snapshots: Sequence[Snapshot]) -> Wanted:
    """Which services the pool must serve: for a caller who keeps given addresses in a store, before `mesh`."""
    agent = _agent(snapshots)
    drafts = _drafts(snapshots)
    _keep_addresses(drafts, agent, [])
    return Wanted(
        tuple(draft.service.id for draft in drafts if not draft.service.addresses),
        ipaddress.ip_network(agent.address_pool),
        frozenset(address for draft in drafts for address in draft.service.addresses),
    )


def policies(snapshots: Sequence[Snapshot]) -> Mapping[ServiceId, ServicePolicy]:
    """One policy per service: the first source's."""
    found: dict[ServiceId, ServicePolicy] = {}
    for snapshot in snapshots:
        for policy in snapshot.policies:
            found.setdefault(policy.service_id, policy)
    return MappingProxyType(found)


def _agent(snapshots: Sequence[Snapshot]) -> Agent:
    return next((snapshot.agent for snapshot in snapshots if snapshot.agent is not None), Agent())


def _drafts(snapshots: Sequence[Snapshot]) -> list[_Draft]:
    """Every service that any source knows, by (namespace, name), with the endpoints of all."""
    drafts: dict[ServiceId, _Draft] = {}
    for rank, snapshot in enumerate(snapshots):
        for service in snapshot.services:
            draft = drafts.setdefault(service.id, _Draft(service, rank))
            if not draft.service.addresses and service.addresses:
                draft.rank = rank  # whose address it is decides when two services want the same
            draft.service = _joined(draft.service, service)
            for endpoint in service.endpoints:
                named = endpoint if endpoint.source else dataclasses.replace(endpoint, source=snapshot.source)
                draft.endpoints.append((named, snapshot.allow_loopback))
    for draft in drafts.values():
        if not draft.service.ports:
            draft.service = dataclasses.replace(draft.service, ports=_instance_ports(draft))
    return sorted(drafts.values(), key=lambda draft: (draft.service.namespace, draft.service.name))


def _joined(first: Service, second: Service) -> Service:
    return dataclasses.replace(
        first,
        labels=first.labels or second.labels,
        addresses=first.addresses or second.addresses,
        ports=first.ports or second.ports,
        source=first.source or second.source,
    )


def _instance_ports(draft: _Draft) -> tuple[Port, ...]:
    """Ports of a service for which no source has any: those of its instances, the protocol as the port's name says.

    An adapter that knows service ports or protocols fills `Service.ports`, and this is not asked.
    """
    protocols = {str(protocol): protocol for protocol in Protocol}
    found: dict[str, Port] = {}
    numbers: set[tuple[str, int]] = set()
    for endpoint, _ in draft.endpoints:
        for name, number in endpoint.ports.items():
            port = Port(name, number, protocols.get(name, Protocol.TCP))
            if name not in found and (place := (addresses.layer4(port.protocol), number)) not in numbers:
                found[name] = port
                numbers.add(place)
    return tuple(found[name] for name in sorted(found))


def _keep_addresses(drafts: Sequence[_Draft], agent: Agent, problems: list[Problem]) -> None:
    """Leave out an address that a service cannot have. Earlier sources come first; in files `schema` has refused it."""
    taken: Taken = {}
    for draft in sorted(drafts, key=lambda draft: draft.rank):
        kept = []
        for address in draft.service.addresses:
            places = _places(draft.service, address)
            why = addresses.unusable(address) or _claimed(places, agent, taken)
            if why:
                problems.append(Problem(draft.service.label, address, f"is {why}"))
                continue
            kept.append(address)
            taken.update(dict.fromkeys(places, draft.service.label))
        draft.service = dataclasses.replace(draft.service, addresses=tuple(kept))


def _places(service: Service, address: str) -> list[tuple[str, str, int]]:
    return [(address, addresses.layer4(port.protocol), port.port) for port in service.ports]


def _claimed(places: Sequence[tuple[str, str, int]], agent: Agent, taken: Taken) -> str:
    for address, layer4, number in places:
        if ours := addresses.our_listener(address, number, agent):
            return f"{ours} at port {number}"
        if (owner := taken.get((address, layer4, number))) is not None:
            return f"the address of service {owner} at port {number}"
    return ""


def _give_addresses(
    drafts: Sequence[_Draft], agent: Agent, given: Mapping[ServiceId, str], problems: list[Problem]
) -> Mapping[ServiceId, str]:
    """Addresses from the pool for services that have none; a full pool leaves the newest without, and says so."""
    network = ipaddress.ip_network(agent.address_pool)
    avoid = {address for draft in drafts for address in draft.service.addresses}
    mapping = pool.still_good(network, given, avoid)
    taken = avoid | set(mapping.values())
    for draft in drafts:
        service = draft.service
        if service.addresses:
            continue
        if service.id not in mapping:
            try:
                mapping[service.id] = pool.choose_address(network, service.id, taken)
            except pool.PoolFull as full:
                problems.append(Problem(service.label, "address", str(full)))
                continue
            taken.add(mapping[service.id])
        if service.id in given and mapping[service.id] != given[service.id]:
            why = f"was {given[service.id]}, which the pool cannot give any more"
            problems.append(Problem(service.label, mapping[service.id], why))
        draft.service = dataclasses.replace(service, addresses=(mapping[service.id],))
    return MappingProxyType(mapping)


def _taken(drafts: Sequence[_Draft]) -> Taken:
    return {
        place: draft.service.label
        for draft in drafts
        for address in draft.service.addresses
        for place in _places(draft.service, address)
    }


def _finished(draft: _Draft, agent: Agent, taken: Taken, problems: list[Problem]) -> Service:
    """The service with its endpoints: united, without repetitions, without what must not be called."""
    protocols = {port.name: port.protocol for port in draft.service.ports}
    seen: set[tuple[str, str, int]] = set()
    kept = []
    for endpoint, allow_loopback in draft.endpoints:
        if why := _refused_address(endpoint.address, allow_loopback):
            problems.append(Problem(draft.service.label, endpoint.address, why))
            continue
        ports: dict[str, int] = {}
        for name, number in endpoint.ports.items():
            if why := _refused_port(endpoint.address, name, number, protocols, agent, taken):
                problems.append(Problem(draft.service.label, addresses.joined(endpoint.address, number), why))
            # Two sources may know the same endpoint; for each port the earlier source's word on weight and state holds.
            elif (endpoint.address, name, number) not in seen:
                ports[name] = number
        seen.update((endpoint.address, name, number) for name, number in ports.items())
        if ports == dict(endpoint.ports):
            kept.append(endpoint)
        elif ports:
            kept.append(dataclasses.replace(endpoint, ports=MappingProxyType(ports)))
    return dataclasses.replace(draft.service, endpoints=tuple(kept))


def _refused_address(address: str, allow_loopback: bool) -> str:
    if why := addresses.unusable(address):
        return f"is {why}"
    if addresses.is_loopback(address) and not allow_loopback:
        return "is on loopback and from a network registry: set allowLoopback to take it"
    return ""


def _refused_port(
    address: str, name: str, number: int, protocols: Mapping[str, Protocol], agent: Agent, taken: Taken
) -> str:
    if name not in protocols:
        return f'has port "{name}", which is not a port of the service (known: {", ".join(protocols) or "none"})'
    if ours := addresses.our_port(address, number, agent):
        return f"is {ours}"
    if (owner := taken.get((address, addresses.layer4(protocols[name]), number))) is not None:
        return f"is the address of service {owner}: name the servers behind it"
    return ""
