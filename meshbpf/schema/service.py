"""Kind `Service`: what a service is. Checks here need only this document; `checks` compares documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from meshbpf.model import Agent, Endpoint, Port, Protocol, Service
from meshbpf.schema import addresses
from meshbpf.schema.fields import Fields
from meshbpf.schema.words import meant, shown
from meshbpf.yamlpos import Mark

API_VERSION = "meshbpf.io/v1"
LARGEST_WEIGHT = 10_000
LARGEST_PORT = 65_535
HOST = ("127.0.0.1", "::1")  # programs call their own helpers there; who calls a service would take those away
_REMEDY = f"use one of {Agent().address_pool}, or leave addresses out and the pool gives one"


@dataclass(frozen=True, slots=True)
class EndpointDocument:
    """`ports_at` is where the number of each port stands."""

    endpoint: Endpoint
    ports_at: Mapping[str, Mark]


@dataclass(frozen=True, slots=True)
class ServiceDocument:
    """A service and where its parts stand; `addresses_at` goes with `service.addresses`."""

    service: Service
    at: Mark
    addresses_at: tuple[Mark, ...]
    endpoints: tuple[EndpointDocument, ...]


def read(document: Fields) -> ServiceDocument:
    metadata = document.below("metadata")
    name = ""
    if metadata.required("name", "the service's name"):
        name = metadata.label("name")
    at = metadata.where("name")
    namespace = metadata.label("namespace", Service(name).namespace)
    labels = metadata.labels("labels")
    spec = document.below("spec")
    listed = _addresses(spec)
    ports = _ports(spec)
    endpoints = _endpoints(spec, ports)
    service = Service(
        name=name,
        namespace=namespace,
        labels=labels,
        addresses=tuple(address for address, _ in listed),
        ports=ports,
        endpoints=tuple(document.endpoint for document in endpoints),
        source=str(at),
    )
    return ServiceDocument(service, at, tuple(place for _, place in listed), endpoints)


def _addresses(spec: Fields) -> list[tuple[str, Mark]]:
    found: dict[str, Mark] = {}
    for path, value, at in spec.items("addresses"):
        if (address := _address(path, value, at, spec)) is None:
            continue
        if address in HOST:
            spec.report.add(at, f"{path} {address} is this host itself: {_REMEDY}")
            continue
        if address in found:
            spec.report.add(at, f"{path} {address} is listed twice: remove one")
        found.setdefault(address, at)
    return list(found.items())


def _address(path: str, value: object, at: Mark, fields: Fields) -> str | None:
    """The canonical address, or None after reporting why it cannot be one."""
    try:
        address = addresses.canonical(value if isinstance(value, str) else "")
    except ValueError as error:
        fields.report.add(at, f"{path} must be {error}, got {shown(value)}")
        return None
    if why := addresses.unusable(address):
        fields.report.add(at, f"{path} {address} is {why}: use an address that a host can have")
        return None
    return address


def _ports(spec: Fields) -> tuple[Port, ...]:
    names: dict[str, Mark] = {}
    numbers: dict[tuple[int, str], str] = {}
    found = []
    spec.required("ports", "a list of at least one port")
    if spec.value("ports") == []:
        spec.wrong("ports", "a list of at least one port")
    for item in spec.mappings("ports"):
        name = item.label("name") if item.required("name", "the port's name, for example http") else ""
        number = item.whole("port", 0, 1, LARGEST_PORT) if item.required("port", "the port's number") else 0
        protocol = item.word("protocol", Protocol.TCP)
        if not name or not number:
            continue
        if (first := names.setdefault(name, item.where("name"))) != item.where("name"):
            item.report.add(
                item.where("name"), f'{item.path}.name "{name}" is taken by the port at {first}: rename one'
            )
            continue
        if (other := numbers.setdefault((number, addresses.layer4(protocol)), name)) != name:
            item.report.add(item.where("port"), f'{item.path}.port {number} is taken by port "{other}": change one')
            continue
        found.append(Port(name, number, protocol))
    return tuple(found)


def _endpoints(spec: Fields, ports: tuple[Port, ...]) -> tuple[EndpointDocument, ...]:
    known = [port.name for port in ports]
    seen: dict[tuple[str, str, int], Mark] = {}
    strange: dict[str, list[tuple[str, Mark]]] = {}
    found = []
    form = f"a mapping, for example {{address: 127.0.0.1, ports: {_ports_example(known)}}}"
    for item in spec.mappings("endpoints", form):
        address = None
        if item.required("address", "the endpoint's IP address"):
            address = _address(item.name("address"), item.value("address"), item.where("address"), item)
        numbers, places = _endpoint_ports(item, known, strange)
        weight = item.whole("weight", Endpoint("", {}).weight, 0, LARGEST_WEIGHT)
        zone = item.text("zone")
        labels = item.labels("labels")
        if address is None:
            continue
        for name, number in numbers.items():
            if (first := seen.setdefault((address, name, number), places[name])) != places[name]:
                twice = f"{addresses.joined(address, number)} is listed twice for port {name}, first at {first}"
                item.report.add(places[name], f"{twice}: raise the weight of one instead")
        endpoint = Endpoint(address, numbers, weight=weight, zone=zone, labels=labels, source=str(item.at))
        found.append(EndpointDocument(endpoint, places))
    for name, ((path, at), *others) in strange.items():
        have = "endpoint has" if len(others) == 1 else "endpoints have"
        more = f" ({len(others)} more {have} it)" if others else ""
        spec.report.add(at, f"{path} is not a port of the service{more}: {meant(name, known)}")
    return tuple(found)


def _ports_example(known: list[str]) -> str:
    return f"{{{known[0] if known else 'http'}: 8080}}"


def _endpoint_ports(
    item: Fields, known: list[str], strange: dict[str, list[tuple[str, Mark]]]
) -> tuple[Mapping[str, int], dict[str, Mark]]:
    """`strange` gathers the names that are no port of the service: a port misspelt there is misspelt to all of them."""
    numbers: dict[str, int] = {}
    places: dict[str, Mark] = {}
    form = f"a mapping from port name to number, for example {_ports_example(known)}"
    item.required("ports", form)
    if item.value("ports") == {}:
        item.wrong("ports", form)
    for name, value, key_at, at in item.pairs("ports", form):
        path = f"{item.name('ports')}.{name}"
        # Without any good port of the service there is nothing to compare with, and its own error says enough.
        if known and name not in known:
            strange.setdefault(name, []).append((path, key_at))
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_PORT:
            item.report.add(at, f"{path} must be a port number from 1 to {LARGEST_PORT}, got {shown(value)}")
        else:
            numbers[name] = value
            places[name] = at
    return MappingProxyType(numbers), places
