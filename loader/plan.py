"""Mesh → what every table of the kernel has to hold. Pure: no clock, no dice, no kernel.

Ids live as long as what they name: a service or endpoint that the kernel already knows keeps its id, a new one gets an
id never used before, because a connect() running right now, or a connection open for days, may still hold an old one.
A service keeps its id only when nobody else's address is led by it: else the other one would be served by us for as
long as the writes take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loader import abi
from meshbpf.carrier import Carrier, choose
from meshbpf.errors import MapFull
from meshbpf.model import Balance, Endpoint, EndpointState, MapSizes, Mesh, OnProxyDown, Port, Protocol, Service

IPPROTO = {Protocol.UDP: 17}
TCP = 6
MAX_SHARES = 100
IDENTITY = abi.EndpointValue.draining.offset  # an endpoint's address and port
Table = dict[bytes, bytes]
TABLES = ("services", "policies", "slots", "endpoints")


@dataclass(slots=True)
class Tables:
    """The loader's tables, raw bytes → raw bytes, as planned or as read from the kernel."""

    services: Table = field(default_factory=dict)
    policies: Table = field(default_factory=dict)
    slots: Table = field(default_factory=dict)
    endpoints: Table = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ids:
    """The first ids never used."""

    service: int = 1
    endpoint: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """`tables` is what the kernel must hold; `service_ids` names the ids, for metrics and the CLI; `free` is what an
    apply has to note before it writes.
    """

    tables: Tables
    service_ids: Mapping[int, tuple[Service, Port]]
    free: Ids


def service_key(address: str, port: int, protocol: Protocol) -> bytes:
    return bytes(abi.ServiceKey(abi.pack_address(address), port, IPPROTO.get(protocol, TCP)))


def shares(weights: list[int]) -> list[int]:
    """Weights as small whole shares: divided by their greatest common divisor, scaled to at most MAX_SHARES."""
    divisor = math.gcd(*weights) if weights else 1
    reduced = [weight // divisor for weight in weights] if divisor else list(weights)
    top = max(reduced, default=0)
    if top > MAX_SHARES:
        reduced = [max(1, round(share * MAX_SHARES / top)) if share else 0 for share in reduced]
    return reduced


def interleave(counts: list[int]) -> list[int]:
    """Indices, each as often as its count, spread evenly: the n-th turn of a count stands at (n - 1/2) / count."""
    turns = [((2 * turn + 1) / count, index) for index, count in enumerate(counts) for turn in range(count)]
    return [index for _when, index in sorted(turns)]


def is_ipv4(value: bytes) -> bool:
    return value.startswith(b"\0" * 10 + b"\xff\xff")


def endpoint_value(endpoint: Endpoint, port: int) -> bytes:
    draining = endpoint.state is EndpointState.DRAINING
    return bytes(abi.EndpointValue(abi.pack_address(endpoint.address), port, draining))


def carried(mesh: Mesh) -> Iterator[tuple[Service, Port, list[bytes]]]:
    """Every service port, with the keys of its addresses."""
    for service in mesh.services:
        for port in service.ports:
            yield service, port, [service_key(address, port.port, port.protocol) for address in service.addresses]


def plan(mesh: Mesh, have: Tables, free: Ids = Ids()) -> Plan:
    """What the kernel must hold for `mesh`, given what it holds. Raises MapFull before anything is written."""
    wanted = Tables()
    names: dict[int, tuple[Service, Port]] = {}
    known_services = {key: int.from_bytes(value, "little") for key, value in have.services.items()}
    # An endpoint's identity is its address and port: the draining flag, which may change, is left out.
    known_endpoints = {value[:IDENTITY]: int.from_bytes(key, "little") for key, value in have.endpoints.items()}
    next_service = max(free.service - 1, *known_services.values(), 0) + 1
    next_endpoint = max(free.endpoint - 1, *known_endpoints.values(), 0) + 1
    led = _still_led(mesh, known_services)
    for service, port, keys in carried(mesh):
        policy = mesh.policy_for(service)
        known = [known_services[key] for key in keys if key in known_services]
        service_id = next((i for i in known if i not in names and led[i] <= set(keys)), 0)
        if not service_id:
            service_id, next_service = next_service, next_service + 1
        names[service_id] = (service, port)
        picked: list[tuple[bytes, bool]] = []
        weights: list[int] = []
        for endpoint in service.endpoints:
            if port.name not in endpoint.ports:
                continue
            value = endpoint_value(endpoint, endpoint.ports[port.name])
            endpoint_id = known_endpoints.get(value[:IDENTITY], 0)
            if not endpoint_id:
                endpoint_id, next_endpoint = next_endpoint, next_endpoint + 1
                known_endpoints[value[:IDENTITY]] = endpoint_id
            endpoint_key = endpoint_id.to_bytes(4, "little")
            # Draining only where every service that names it says so: the slots know which one does.
            wanted.endpoints[endpoint_key] = min(value, wanted.endpoints.get(endpoint_key, value))
            if endpoint.state is EndpointState.READY and endpoint.weight > 0:
                picked.append((endpoint_key, is_ipv4(value)))
                weights.append(endpoint.weight)
        order = [picked[which] for which in interleave(shares(weights))]
        order.sort(key=lambda entry: not entry[1])  # stable: IPv4 first, each family still spread evenly
        for index, (endpoint_key, _ipv4) in enumerate(order):
            wanted.slots[bytes(abi.SlotKey(service_id, index))] = endpoint_key
        random = policy.load_balancer.simple is Balance.RANDOM
        wanted.policies[service_id.to_bytes(4, "little")] = bytes(
            abi.PolicyValue(
                len(order),
                sum(ipv4 for _key, ipv4 in order),
                abi.Carried.DIRECT if choose(port, policy).carrier is Carrier.DIRECT else abi.Carried.PROXY,
                abi.Pick.RANDOM if random else abi.Pick.ROUND_ROBIN,
                abi.Down.REFUSE if policy.on_proxy_down is OnProxyDown.REFUSE else abi.Down.DIRECT,
            )
        )
        for key in keys:
            wanted.services[key] = service_id.to_bytes(4, "little")
    _check_room(have, wanted, mesh.agent.maps)
    return Plan(wanted, names, Ids(next_service, next_endpoint))


def _still_led(mesh: Mesh, known: Mapping[bytes, int]) -> dict[int, set[bytes]]:
    """Service id → the keys that the kernel leads by it and that the mesh still has."""
    led: dict[int, set[bytes]] = {service_id: set() for service_id in known.values()}
    for _service, _port, keys in carried(mesh):
        for key in keys:
            if key in known:
                led[known[key]].add(key)
    return led


def _check_room(have: Tables, wanted: Tables, sizes: MapSizes) -> None:
    """Addresses leave their table before new ones come; of the rest, old and new are there together for a moment."""
    for name in TABLES:
        entries = len(getattr(wanted, name))
        if name != "services":
            entries += sum(1 for key in getattr(have, name) if key not in getattr(wanted, name))
        if entries > getattr(sizes, name):
            raise MapFull(name, getattr(sizes, name))
