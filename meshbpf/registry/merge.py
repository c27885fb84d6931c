"""Several sources to one mesh. Pure: snapshots in order of precedence come in (files first), a mesh comes out.

Rules, per service: addresses, ports and labels are the first source's that has them; endpoints are united, and the same
endpoint in two sources is the earlier one's. What a registry says is not trusted like a file: an endpoint or address
that would loop, collide or reach our own ports is left out and reported, and everything else goes on.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import NamedTuple

from meshbpf.carrier import lack
from meshbpf.model import DEFAULT_POLICY, Agent, Endpoint, Mesh, Port, Protocol, Service, ServicePolicy
from meshbpf.registry.base import Snapshot
from meshbpf.registry.claims import (
    Draft,
    Problem,
    Taken,
    give_addresses,
    keep_addresses,
    refused_address,
    refused_port,
    taken_by,
)
from meshbpf.registry.instance import IPNetwork, ServiceId
from meshbpf.schema import addresses


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


def mesh(snapshots: Sequence[Snapshot], given: Mapping[ServiceId, str], generation: int = 0) -> Merged:
    """The mesh of all snapshots; `given` holds the addresses which the pool gave before: they stay."""
    return Merger().mesh(snapshots, given, generation)


def wanted(snapshots: Sequence[Snapshot]) -> Wanted:
    """Which services the pool must serve: for a caller who keeps given addresses in a store, before `mesh`."""
    return Merger().wanted(snapshots)


class Merger:
    """Merges again and again. A service of which every source says what it said before stays the same object, and while
    nobody's addresses and ports change, only the others are looked at.
    """

    def __init__(self) -> None:
        self._snapshots: Sequence[Snapshot] = ()
        self._spoken: list[dict[ServiceId, Service]] = []  # their services
        self._agent = Agent()
        self._suspect = addresses.suspect_ports(self._agent)
        self._drafts: dict[ServiceId, Draft] = {}  # before anybody's addresses are judged or given
        self._order: list[ServiceId] = []
        self._wanted: Wanted | None = None
        self._kept: tuple[list[Draft], list[Problem]] | None = None  # from `wanted` to `mesh`
        # What was decided for all services together, with the given addresses that it was decided with (None: not yet).
        self._given: Mapping[ServiceId, str] | None = None
        self._merged: Mapping[ServiceId, str] = {}
        self._addresses: dict[ServiceId, tuple[str, ...]] = {}
        self._taken: Taken = {}
        self._problems: list[Problem] = []
        self._finished: dict[ServiceId, tuple[Service, list[Problem]]] = {}

    def wanted(self, snapshots: Sequence[Snapshot]) -> Wanted:
        """As the function; the same object when it is what it was the last time."""
        self._take(snapshots)
        if self._wanted is None:
            drafts, _problems = self._kept = self._keep()
            self._wanted = Wanted(
                tuple(draft.service.id for draft in drafts if not draft.service.addresses),
                ipaddress.ip_network(self._agent.address_pool),
                frozenset(address for draft in drafts for address in draft.service.addresses),
            )
        return self._wanted

    def mesh(self, snapshots: Sequence[Snapshot], given: Mapping[ServiceId, str], generation: int = 0) -> Merged:
        """As the function."""
        self._take(snapshots)
        if self._given is None or self._given != given:
            self._address(given)
        self._kept = None
        for identity in self._order:
            if identity not in self._finished:
                problems: list[Problem] = []
                service = self._finish(self._drafts[identity], self._addresses[identity], problems)
                self._finished[identity] = (service, problems)
        found = [self._finished[identity] for identity in self._order]
        told = (*self._problems, *(problem for _service, own in found for problem in own))
        services = tuple([service for service, _own in found])
        return Merged(Mesh(self._agent, services, policies(snapshots), generation), told, self._merged)

    def _take(self, snapshots: Sequence[Snapshot]) -> None:
        """Look at what the sources say; forget what was concluded from what they do not say any more."""
        if len(snapshots) == len(self._snapshots) and all(map(is_, snapshots, self._snapshots)):
            return
        if not self._take_changes(snapshots):
            self._take_all(snapshots)
        self._snapshots, self._kept = tuple(snapshots), None

    def _take_changes(self, snapshots: Sequence[Snapshot]) -> bool:
        """Look at the services that changed only; False when that is not all there is to do."""
        if [_frame(s) for s in snapshots] != [_frame(s) for s in self._snapshots]:
            return False
        changed: set[ServiceId] = set()
        spoken = [
            known if new is old else {service.id: service for service in new.services}
            for known, new, old in zip(self._spoken, snapshots, self._snapshots, strict=True)
        ]
        if sum(map(len, spoken)) != sum(len(snapshot.services) for snapshot in snapshots):
            return False  # a source that says something twice
        drafts: dict[ServiceId, Draft] = {}
        for known, new in zip(self._spoken, spoken, strict=True):
            if known is new:
                continue
            if known.keys() != new.keys():
                return False
            changed.update(identity for identity, service in new.items() if service is not known[identity])
        for identity in changed:
            old = self._drafts[identity]
            said = [(rank, services[identity]) for rank, services in enumerate(spoken) if identity in services]
            drafts[identity] = _draft(said, old.policy)
            if _called(old) != _called(drafts[identity]):
                return False
        for identity in drafts:
            self._finished.pop(identity, None)
        self._drafts.update(drafts)
        self._spoken = spoken
        return True

    def _take_all(self, snapshots: Sequence[Snapshot]) -> None:
        words: dict[ServiceId, list[tuple[int, Service]]] = {}
        for rank, snapshot in enumerate(snapshots):
            for service in snapshot.services:
                words.setdefault((service.name, service.namespace), []).append((rank, service))
        agent = _agent(snapshots)
        same = agent == self._agent and len(words) == len(self._drafts)
        same = same and [_setting(s) for s in snapshots] == [_setting(s) for s in self._snapshots]
        drafts: dict[ServiceId, Draft] = {}
        governed = policies(snapshots)
        for identity, said in words.items():
            known = self._drafts.get(identity)
            policy = governed.get(identity, DEFAULT_POLICY)
            if known is not None and _carries_alike(known.policy, policy) and _same_words(known.words, said):
                drafts[identity] = known
                continue
            draft = drafts[identity] = _draft(said, policy)
            same = same and known is not None and _called(known) == _called(draft)
            self._finished.pop(identity, None)
        if not same:
            self._order = sorted(drafts, key=lambda identity: (identity[1], identity[0]))
            self._wanted = self._given = None
        self._agent, self._suspect, self._drafts = agent, addresses.suspect_ports(agent), drafts
        self._spoken = [{service.id: service for service in snapshot.services} for snapshot in snapshots]

    def _keep(self) -> tuple[list[Draft], list[Problem]]:
        """Copies of the drafts with the addresses that they may keep, and the others."""
        drafts = [dataclasses.replace(self._drafts[identity]) for identity in self._order]
        problems: list[Problem] = []
        keep_addresses(drafts, self._agent, problems)
        return drafts, problems

    def _address(self, given: Mapping[ServiceId, str]) -> None:
        """Who is called by which addresses."""
        self._finished = {}
        (drafts, self._problems), self._kept = self._kept or self._keep(), None
        self._merged = give_addresses(drafts, self._agent, given, self._problems)
        self._addresses = {draft.service.id: draft.service.addresses for draft in drafts}
        self._taken, self._given = taken_by(drafts), given

    def _finish(self, draft: Draft, called: tuple[str, ...], problems: list[Problem]) -> Service:
        """The service with its endpoints: united, without repetitions, without what must not be called."""
        service = draft.service
        for port in draft.uncarried:
            problems.append(Problem(service.label, f"port {port.name}", lack(port, draft.policy)))
        uncarried = [port.name for port in draft.uncarried]
        protocols = {port.name: port.protocol for port in service.ports}
        layers = {port.name: addresses.layer4(port.protocol) for port in service.ports}
        suspect, taken = self._suspect, self._taken
        seen: set[tuple[str, str, int]] = set()
        kept: list[Endpoint] = []
        for rank, word in draft.words:
            source, allow_loopback = _setting(self._snapshots[rank])
            for endpoint in word.endpoints:
                address = endpoint.address
                if why := refused_address(address, allow_loopback):
                    problems.append(Problem(service.label, address, why))
                    continue
                ports: dict[str, int] = {}
                for name, number in endpoint.ports.items():
                    # Most are in order; the rest is looked at more closely, to say why.
                    if (name not in layers or number in suspect or (address, layers[name], number) in taken) and (
                        why := refused_port(address, name, number, protocols, self._agent, taken)
                    ):
                        if name not in uncarried:
                            problems.append(Problem(service.label, addresses.joined(address, number), why))
                    # Two sources may know the same endpoint; for each port the earlier source's word on weight and
                    # state holds.
                    elif (address, name, number) not in seen:
                        ports[name] = number
                for name, number in ports.items():
                    seen.add((address, name, number))
                if not endpoint.source:
                    endpoint = dataclasses.replace(endpoint, source=source)  # noqa: PLW2901
                if len(ports) == len(endpoint.ports):
                    kept.append(endpoint)
                elif ports:
                    kept.append(dataclasses.replace(endpoint, ports=MappingProxyType(ports)))
        if (
            service.addresses == called
            and len(kept) == len(service.endpoints)
            and all(map(is_, kept, service.endpoints))
        ):
            return service
        return dataclasses.replace(service, addresses=called, endpoints=tuple(kept))


def policies(snapshots: Sequence[Snapshot]) -> Mapping[ServiceId, ServicePolicy]:
    """One policy per service: the first source's."""
    found: dict[ServiceId, ServicePolicy] = {}
    for snapshot in snapshots:
        for policy in snapshot.policies:
            found.setdefault(policy.service_id, policy)
    return MappingProxyType(found)


def _agent(snapshots: Sequence[Snapshot]) -> Agent:
    return next((snapshot.agent for snapshot in snapshots if snapshot.agent is not None), Agent())


def _setting(snapshot: Snapshot) -> tuple[str, bool]:
    return (snapshot.source, snapshot.allow_loopback)


def _frame(snapshot: Snapshot) -> tuple[object, ...]:
    """All that a snapshot says besides its services, as far as a mesh depends on it."""
    return (_setting(snapshot), snapshot.agent, snapshot.policies)


def _same_words(old: Sequence[tuple[int, Service]], new: Sequence[tuple[int, Service]]) -> bool:
    return len(old) == len(new) and all(a[1] is b[1] and a[0] == b[0] for a, b in zip(old, new, strict=True))


def _called(draft: Draft) -> tuple[object, ...]:
    """All of a service that others' endpoints and addresses are judged by."""
    return (draft.rank, draft.service.addresses, draft.service.ports)


def _carries_alike(left: ServicePolicy, right: ServicePolicy) -> bool:
    return (left.mode, left.load_balancer.by_client) == (right.mode, right.load_balancer.by_client)


def _draft(words: list[tuple[int, Service]], policy: ServicePolicy) -> Draft:
    """What one service is by the words of all sources that know it. In files `schema` has refused ports that nobody
    carries as their policy says."""
    rank, service = words[0]
    for other_rank, other in words[1:]:
        if not service.addresses and other.addresses:
            rank = other_rank  # whose address it is decides when two services want the same
        service = _joined(service, other)
    if not service.ports:
        service = dataclasses.replace(service, ports=_instance_ports(words))
    uncarried = tuple(port for port in service.ports if lack(port, policy))
    if uncarried:
        service = dataclasses.replace(service, ports=tuple(port for port in service.ports if port not in uncarried))
    return Draft(service, rank, words, policy, uncarried)


def _joined(first: Service, second: Service) -> Service:
    return dataclasses.replace(
        first,
        labels=first.labels or second.labels,
        addresses=first.addresses or second.addresses,
        ports=first.ports or second.ports,
        source=first.source or second.source,
    )


def _instance_ports(words: Sequence[tuple[int, Service]]) -> tuple[Port, ...]:
    """Ports of a service for which no source has any: those of its instances, the protocol as the port's name says.

    An adapter that knows service ports or protocols fills `Service.ports`, and this is not asked.
    """
    protocols = {str(protocol): protocol for protocol in Protocol}
    found: dict[str, Port] = {}
    numbers: set[tuple[str, int]] = set()
    for endpoint in (endpoint for _rank, service in words for endpoint in service.endpoints):
        for name, number in endpoint.ports.items():
            port = Port(name, number, protocols.get(name, Protocol.TCP))
            if name not in found and (place := (addresses.layer4(port.protocol), number)) not in numbers:
                found[name] = port
                numbers.add(place)
    return tuple(found[name] for name in sorted(found))
