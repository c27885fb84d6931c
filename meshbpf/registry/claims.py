"""Who may have which address and port: services of files and registries, what the pool gives, and endpoints. Pure.

Earlier sources come first. What cannot be had is left out and becomes a Problem, and everything else goes on.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from meshbpf.model import DEFAULT_POLICY, Agent, Port, Protocol, Service, ServicePolicy
from meshbpf.registry import pool
from meshbpf.registry.instance import ServiceId
from meshbpf.schema import addresses

Taken = dict[tuple[str, str, int], str]  # (address, tcp or udp, port) → label of the service


class Problem(NamedTuple):
    """Something left out of the mesh: of which service, what (an address, a port or an endpoint), and why."""

    service: str
    what: str
    why: str


@dataclass(slots=True)
class Draft:
    """A service while sources add to it. `rank` is the source that addresses it; `words` are what all sources say of
    it, each with its rank. `uncarried` are ports that are left out because nobody does with them what `policy` says."""

    service: Service
    rank: int
    words: list[tuple[int, Service]]
    policy: ServicePolicy = DEFAULT_POLICY
    uncarried: tuple[Port, ...] = ()


def keep_addresses(drafts: Sequence[Draft], agent: Agent, problems: list[Problem]) -> None:
    """Leave out an address that a service cannot have. Earlier sources come first; in files `schema` has refused it."""
    taken: Taken = {}
    suspect = addresses.suspect_ports(agent)
    for draft in sorted(drafts, key=lambda draft: draft.rank):
        kept = []
        for address in draft.service.addresses:
            places = _places(draft.service, address)
            why = addresses.unusable(address) or _claimed(places, agent, suspect, taken)
            if why:
                problems.append(Problem(draft.service.label, address, f"is {why}"))
                continue
            kept.append(address)
            taken.update(dict.fromkeys(places, draft.service.label))
        if len(kept) != len(draft.service.addresses):
            draft.service = dataclasses.replace(draft.service, addresses=tuple(kept))


def _places(service: Service, address: str) -> list[tuple[str, str, int]]:
    return [(address, addresses.layer4(port.protocol), port.port) for port in service.ports]


def _claimed(places: Sequence[tuple[str, str, int]], agent: Agent, suspect: Container[int], taken: Taken) -> str:
    for address, layer4, number in places:
        if number in suspect and (ours := addresses.our_listener(address, number, agent)):
            return f"{ours} at port {number}"
        if (owner := taken.get((address, layer4, number))) is not None:
            return f"the address of service {owner} at port {number}"
    return ""


def give_addresses(
    drafts: Sequence[Draft], agent: Agent, given: Mapping[ServiceId, str], problems: list[Problem]
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


def taken_by(drafts: Sequence[Draft]) -> Taken:
    return {
        place: draft.service.label
        for draft in drafts
        for address in draft.service.addresses
        for place in _places(draft.service, address)
    }


def refused_address(address: str, allow_loopback: bool) -> str:
    if not addresses.ordinary(address) and (why := addresses.unusable(address)):
        return f"is {why}"
    if not allow_loopback and addresses.is_loopback(address):
        return "is on loopback and from a network registry: set allowLoopback to take it"
    return ""


def refused_port(
    address: str, name: str, number: int, protocols: Mapping[str, Protocol], agent: Agent, taken: Taken
) -> str:
    if name not in protocols:
        return f'has port "{name}", which is not a port of the service (known: {", ".join(protocols) or "none"})'
    if ours := addresses.our_port(address, number, agent):
        return f"is {ours}"
    if (owner := taken.get((address, addresses.layer4(protocols[name]), number))) is not None:
        return f"is the address of service {owner}: name the servers behind it"
    return ""
