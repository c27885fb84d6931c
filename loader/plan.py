"""Mesh → what every table of the kernel has to hold. Pure: no clock, no dice, no kernel.

Ids live as long as what they name: a service or endpoint that the kernel already knows keeps its id, a new one gets an
id never used before, because a connect() running right now, or a connection open for days, may still hold an old one.
A service keeps its id only when nobody else's address is led by it: else the other one would be served by us for as
long as the writes take.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loader import abi
from loader.slots import IDENTITY, MAPPED, spread
from meshbpf.carrier import Carrier, choose
from meshbpf.errors import MapFull
from meshbpf.model import (
    Endpoint,
    EndpointState,
    MapSizes,
    Mesh,
    OnProxyDown,
    Port,
    Protocol,
    Service,
    ServicePolicy,
    SessionAffinity,
)

IPPROTO = {Protocol.UDP: 17}
TCP = 6
# Layouts of abi.py that are packed by the hundred thousand; a unit test holds them against it.
ENDPOINT = struct.Struct(">16sHBB")  # EndpointValue, and ServiceKey with a protocol instead of the flag
SLOT = struct.Struct("<II")  # SlotKey
POLICY = struct.Struct("<IIBBBBII")  # PolicyValue
OCTETS = {str(number): bytes([number]) for number in range(256)}
Table = dict[bytes, bytes]
TABLES = ("services", "policies", "slots", "serving", "endpoints")
KEEPS, TAKES = (number.to_bytes(4, "little") for number in abi.Serving)


@dataclass(slots=True)
class Tables:
    """The loader's tables, raw bytes → raw bytes, as planned or as read from the kernel."""

    services: Table = field(default_factory=dict)
    policies: Table = field(default_factory=dict)
    slots: Table = field(default_factory=dict)
    serving: Table = field(default_factory=dict)
    endpoints: Table = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ids:
    """The first ids never used."""

    service: int = 1
    endpoint: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """`tables` is what the kernel must hold; `service_ids` names the ids, for metrics and the CLI; `free` is what an
    apply has to note before it writes; `named` are the endpoints as each service port names them.
    """

    tables: Tables
    service_ids: Mapping[int, tuple[Service, Port]]
    free: Ids
    named: list[tuple[bytes, bytes]] = field(default_factory=list)


def sized_by(table: str) -> str:
    """The field of `MapSizes` that says how many rows the table holds."""
    return "endpoints" if table == "serving" else table


def service_key(address: str, port: int, protocol: Protocol) -> bytes:
    return ENDPOINT.pack(packed(address), port, IPPROTO.get(protocol, TCP), 0)


def packed(address: str) -> bytes:
    """As `abi.pack_address`, of an address in its canonical text: a large mesh asks for hundreds of thousands."""
    try:
        one, two, three, four = address.split(".")
        return MAPPED + OCTETS[one] + OCTETS[two] + OCTETS[three] + OCTETS[four]
    except (ValueError, KeyError):
        return bytes(abi.pack_address(address))


def endpoint_value(endpoint: Endpoint, port: int) -> bytes:
    return ENDPOINT.pack(packed(endpoint.address), port, endpoint.state is EndpointState.DRAINING, 0)


def carried(mesh: Mesh) -> Iterator[tuple[Service, Port, list[bytes]]]:
    """Every service port, with the keys of its addresses."""
    for service in mesh.services:
        for port in service.ports:
            yield service, port, [service_key(address, port.port, port.protocol) for address in service.addresses]


def service_names(held: Table, mesh: Mesh) -> dict[int, tuple[Service, Port]]:
    """What the ids in a table of services, as the kernel holds it, stand for. One of a mesh before is not named."""
    return {
        int.from_bytes(held[key], "little"): (service, port)
        for service, port, keys in carried(mesh)
        for key in keys
        if key in held
    }


class EndpointIds:
    """Which id an endpoint has: that of the kernel, else one never used. Its identity is address and port: the draining
    flag, which may change, is left out.
    """

    def __init__(self, have: Table, free: int) -> None:
        self._known = {value[:IDENTITY]: key for key, value in have.items()}
        self.free = max(free - 1, *(int.from_bytes(key, "little") for key in have), 0) + 1

    def key(self, value: bytes) -> bytes:
        """The key of the endpoint that has this value."""
        key = self._known.get(value[:IDENTITY])
        if key is None:
            key = self._known[value[:IDENTITY]] = self.free.to_bytes(4, "little")
            self.free += 1
        return key

    def forget(self, value: bytes) -> None:
        """The kernel holds it no more: should it come back, it is another one."""
        del self._known[value[:IDENTITY]]


@dataclass(frozen=True, slots=True)
class PortRows:
    """What one service port takes: its endpoints (also those that no slot names), slots and policy; of UDP, and with
    sessionAffinity, `serving` names the endpoints that a socket or client may stay with.
    """

    endpoints: list[tuple[bytes, bytes]]
    serving: list[tuple[bytes, bytes]]
    slots: list[tuple[bytes, bytes]]
    policy: bytes


def _limit(port: Port, policy: ServicePolicy, direct: bool) -> int:
    """How many connections connect lets be open at once; 0: it does not count. The proxy counts its own."""
    tcp = policy.connection_pool.tcp
    return tcp.max_connections if direct and port.protocol is not Protocol.UDP and tcp.limits_direct else 0


def rows_of(service: Service, port: Port, policy: ServicePolicy, service_id: int, ids: EndpointIds) -> PortRows:
    endpoints: list[tuple[bytes, bytes]] = []
    serving: list[tuple[bytes, bytes]] = []
    picked: list[tuple[bytes, bytes, int]] = []
    own = service_id.to_bytes(4, "little")
    affinity = policy.load_balancer.session_affinity is SessionAffinity.CLIENT_IP
    notes = affinity or port.protocol is Protocol.UDP
    for endpoint in service.endpoints:
        number = endpoint.ports.get(port.name)
        if number is None:
            continue
        value = endpoint_value(endpoint, number)
        key = ids.key(value)
        endpoints.append((key, value))
        takes = endpoint.weight > 0 and endpoint.state is EndpointState.READY
        if takes:
            picked.append((key, value, endpoint.weight))
        if notes:
            serving.append((own + key, TAKES if takes else KEEPS))
    chosen = spread(picked, policy.load_balancer)
    direct = choose(port, policy).carrier is Carrier.DIRECT
    slots = [(SLOT.pack(service_id, index), key) for index, key in enumerate(chosen.slots)]
    held = POLICY.pack(
        len(slots),
        chosen.ipv4,
        abi.Carried.DIRECT if direct else abi.Carried.PROXY,
        chosen.pick,
        abi.Down.REFUSE if policy.on_proxy_down is OnProxyDown.REFUSE else abi.Down.DIRECT,
        0,
        round(1000 * policy.load_balancer.session_affinity_timeout) if affinity else 0,
        _limit(port, policy, direct),
    )
    return PortRows(endpoints, serving, slots, held)


def plan(mesh: Mesh, have: Tables, free: Ids = Ids()) -> Plan:
    """What the kernel must hold for `mesh`, given what it holds. Raises MapFull before anything is written."""
    wanted = Tables()
    names: dict[int, tuple[Service, Port]] = {}
    known_services = {key: int.from_bytes(value, "little") for key, value in have.services.items()}
    endpoints = EndpointIds(have.endpoints, free.endpoint)
    next_service = max(free.service - 1, *known_services.values(), 0) + 1
    led = _still_led(mesh, known_services)
    named: list[tuple[bytes, bytes]] = []
    for service, port, keys in carried(mesh):
        policy = mesh.policy_for(service)
        known = [known_services[key] for key in keys if key in known_services]
        service_id = next((i for i in known if i not in names and led[i] <= set(keys)), 0)
        if not service_id:
            service_id, next_service = next_service, next_service + 1
        names[service_id] = (service, port)
        rows = rows_of(service, port, policy, service_id, endpoints)
        named += rows.endpoints
        for endpoint_key, value in rows.endpoints:
            # Draining only where every service that names it says so: the slots know which one does.
            held = wanted.endpoints.setdefault(endpoint_key, value)
            if value < held:
                wanted.endpoints[endpoint_key] = value
        wanted.serving.update(rows.serving)
        wanted.slots.update(rows.slots)
        wanted.policies[service_id.to_bytes(4, "little")] = rows.policy
        for key in keys:
            wanted.services[key] = service_id.to_bytes(4, "little")
    _check_room(have, wanted, mesh.agent.maps)
    return Plan(wanted, names, Ids(next_service, endpoints.free), named)


def _still_led(mesh: Mesh, known: Mapping[bytes, int]) -> dict[int, set[bytes]]:
    """Service id → the keys that the kernel leads by it and that the mesh still has."""
    led: dict[int, set[bytes]] = {service_id: set() for service_id in known.values()}
    for _service, _port, keys in carried(mesh) if known else ():
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
        if entries > getattr(sizes, sized_by(name)):
            raise MapFull(sized_by(name), getattr(sizes, sized_by(name)))
