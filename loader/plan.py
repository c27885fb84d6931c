"""Mesh → what every table of the kernel has to hold. Pure: no clock, no dice, no kernel.

Ids live as long as what they name: a service or endpoint that the kernel already knows keeps its id, a new one gets an
id never used before, because a connect() running right now may still hold an old one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loader import abi
from meshbpf.carrier import Carrier, choose
from meshbpf.errors import MapFull
from meshbpf.model import Balance, Endpoint, EndpointState, MapSizes, Mesh, OnProxyDown, Port, Protocol, Service

IPPROTO = {Protocol.UDP: 17}
TCP = 6
MAX_SHARES = 100
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
class Plan:
    """`tables` is what the kernel must hold; `service_ids` names the ids, for metrics and the CLI."""

    tables: Tables
    service_ids: Mapping[int, tuple[Service, Port]]


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
    """Indices, each as often as its count, spread evenly (nginx's smooth weighted round robin)."""
    if len(set(counts)) == 1:
        return list(range(len(counts))) * counts[0]
    total, current, order = sum(counts), [0] * len(counts), []
    for _ in range(total):
        for index, count in enumerate(counts):
            current[index] += count
        best = max(range(len(counts)), key=current.__getitem__)
        current[best] -= total
        order.append(best)
    return order


def endpoint_value(endpoint: Endpoint, port: int) -> bytes:
    draining = endpoint.state is EndpointState.DRAINING
    return bytes(abi.EndpointValue(abi.pack_address(endpoint.address), port, draining))


def plan(mesh: Mesh, have: Tables) -> Plan:
    """What the kernel must hold for `mesh`, given what it holds. Raises MapFull before anything is written."""
    wanted = Tables()
    names: dict[int, tuple[Service, Port]] = {}
    known_services = {key: int.from_bytes(value, "little") for key, value in have.services.items()}
    # An endpoint's identity is its address and port: the draining flag, which may change, is left out.
    known_endpoints = {value[:18]: int.from_bytes(key, "little") for key, value in have.endpoints.items()}
    next_service = max(known_services.values(), default=0) + 1
    next_endpoint = max(known_endpoints.values(), default=0) + 1
    for service in mesh.services:
        policy = mesh.policy_for(service)
        for port in service.ports:
            if port.protocol is Protocol.UDP:
                continue  # no hook carries datagrams yet; the address stays untouched
            keys = [service_key(address, port.port, port.protocol) for address in service.addresses]
            known = [known_services[key] for key in keys if key in known_services]
            service_id = next((i for i in known if i not in names), 0)
            if not service_id:
                service_id, next_service = next_service, next_service + 1
            names[service_id] = (service, port)
            picked: list[int] = []
            weights: list[int] = []
            for endpoint in service.endpoints:
                if port.name not in endpoint.ports:
                    continue
                value = endpoint_value(endpoint, endpoint.ports[port.name])
                endpoint_id = known_endpoints.get(value[:18], 0)
                if not endpoint_id:
                    endpoint_id, next_endpoint = next_endpoint, next_endpoint + 1
                    known_endpoints[value[:18]] = endpoint_id
                wanted.endpoints[endpoint_id.to_bytes(4, "little")] = value
                if endpoint.state is EndpointState.READY and endpoint.weight > 0:
                    picked.append(endpoint_id)
                    weights.append(endpoint.weight)
            order = interleave(shares(weights)) if picked else []
            for index, which in enumerate(order):
                wanted.slots[bytes(abi.SlotKey(service_id, index))] = picked[which].to_bytes(4, "little")
            random = policy.load_balancer.simple is Balance.RANDOM
            wanted.policies[service_id.to_bytes(4, "little")] = bytes(
                abi.PolicyValue(
                    len(order),
                    abi.Carried.DIRECT if choose(port, policy).carrier is Carrier.DIRECT else abi.Carried.PROXY,
                    abi.Pick.RANDOM if random else abi.Pick.ROUND_ROBIN,
                    abi.Down.REFUSE if policy.on_proxy_down is OnProxyDown.REFUSE else abi.Down.DIRECT,
                )
            )
            for key in keys:
                wanted.services[key] = service_id.to_bytes(4, "little")
    _check_room(wanted, mesh.agent.maps)
    return Plan(wanted, names)


def _check_room(wanted: Tables, sizes: MapSizes) -> None:
    for name in TABLES:
        if len(getattr(wanted, name)) > getattr(sizes, name):
            raise MapFull(name, getattr(sizes, name))
