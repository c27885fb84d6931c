"""Services that are in order, read quickly: ten thousand of them must not take a minute to start with.

The rule: what is returned is what `service.read` would return, without any fault; None is for everything else, also for
what is only unusual, and then `service.read` decides and says what is wrong where. Needs no positions, but uses what
there are. A unit test holds the two readers against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from meshbpf.model import Endpoint, Port, Protocol, Service
from meshbpf.schema import addresses, later
from meshbpf.schema.fields import LABEL
from meshbpf.schema.service import API_VERSION, HOST, LARGEST_PORT, LARGEST_WEIGHT, EndpointDocument, ServiceDocument
from meshbpf.yamlpos import Map, Mark, Seq

_DOCUMENT = {"apiVersion", "kind", "metadata", "spec"}
_METADATA = {"name", "namespace", "labels"}
_SPEC = {"addresses", "ports", "endpoints"}
_PORT = {"name", "port", "protocol"}
_ENDPOINT = {"address", "ports", "weight", "zone", "labels"}
_PROTOCOLS = {str(p): p for p in Protocol if f"Service.spec.ports.protocol={p}" not in later.FIELDS}
_NONE: Mapping[str, str] = MappingProxyType({})
_NAMESPACE = Service("").namespace
_WEIGHT = Endpoint("", {}).weight


class _Unusual(Exception):
    """Not for us."""


def read(document: Any, at: Mark) -> ServiceDocument | None:
    """The service; `at` is where the document begins."""
    try:
        return _service(document, at)
    except _Unusual:
        return None


def _mapping(value: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= known:
        raise _Unusual
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unusual
    return value


def _label(value: Any) -> str:
    if not isinstance(value, str) or LABEL.fullmatch(value) is None:
        raise _Unusual
    return value


def _number(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _Unusual
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Unusual
    return value


def _labels(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _Unusual
    return MappingProxyType(dict(value))


def _address(value: Any) -> str:
    if isinstance(value, str) and addresses.ordinary(value):
        return value
    try:
        address = addresses.canonical(_text(value))
    except ValueError:
        raise _Unusual from None
    if addresses.unusable(address):
        raise _Unusual
    return address


def _service(document: Any, begin: Mark) -> ServiceDocument:
    whole = _mapping(document, _DOCUMENT)
    if whole.get("kind") != "Service" or whole.get("apiVersion") != API_VERSION:
        raise _Unusual
    metadata = _mapping(whole.get("metadata"), _METADATA)
    spec = _mapping(whole.get("spec"), _SPEC)
    at = metadata.at.get("name", begin) if isinstance(metadata, Map) else begin
    ports = _ports(spec.get("ports"))
    listed = [_address(value) for value in _list(spec.get("addresses", []))]
    if len(set(listed)) != len(listed) or any(address in HOST for address in listed):
        raise _Unusual
    endpoints = _endpoints(spec.get("endpoints", []), {port.name for port in ports}, begin)
    service = Service(
        name=_label(metadata.get("name")),
        namespace=_label(metadata.get("namespace", _NAMESPACE)),
        labels=_labels(metadata["labels"]) if "labels" in metadata else _NONE,
        addresses=tuple(listed),
        ports=ports,
        endpoints=endpoints,
        source=str(at),
    )
    here = dict.fromkeys((port.name for port in ports), at)
    return ServiceDocument(
        service, at, (at,) * len(listed), tuple(EndpointDocument(endpoint, here) for endpoint in endpoints)
    )


def _ports(value: Any) -> tuple[Port, ...]:
    found = []
    for item in _list(value):
        port = _mapping(item, _PORT)
        protocol = _PROTOCOLS.get(_text(port.get("protocol", "tcp")))
        if protocol is None:
            raise _Unusual
        found.append(Port(_label(port.get("name")), _number(port.get("port"), 1, LARGEST_PORT), protocol))
    names = {port.name for port in found}
    places = {(port.port, addresses.layer4(port.protocol)) for port in found}
    if not found or len(names) != len(found) or len(places) != len(found):
        raise _Unusual
    return tuple(found)


def _endpoints(value: Any, known: set[str], begin: Mark) -> tuple[Endpoint, ...]:
    items = _list(value)
    places: list[Mark] | None = items.at if isinstance(items, Seq) else None
    here = str(begin)
    seen: set[tuple[str, str, int]] = set()
    same: dict[tuple[tuple[str, int], ...], Mapping[str, int]] = {}  # most endpoints of a service have the same ports
    found, named = [], 0
    for index, item in enumerate(items):
        endpoint = _mapping(item, _ENDPOINT)
        address = _address(endpoint.get("address"))
        given = endpoint.get("ports")
        if not given or not isinstance(given, dict) or not given.keys() <= known:
            raise _Unusual
        for name, number in given.items():
            if type(number) is not int or not 1 <= number <= LARGEST_PORT:
                raise _Unusual
            seen.add((address, name, number))
        pairs = tuple(given.items())
        if (ports := same.get(pairs)) is None:
            ports = same[pairs] = MappingProxyType(dict(given))
        named += len(pairs)
        found.append(
            Endpoint(
                address,
                ports,
                _number(endpoint["weight"], 0, LARGEST_WEIGHT) if "weight" in endpoint else _WEIGHT,
                _text(endpoint["zone"]) if "zone" in endpoint else "",
                _labels(endpoint["labels"]) if "labels" in endpoint else _NONE,
                source=here if places is None else str(places[index]),
            )
        )
    if len(seen) != named:
        raise _Unusual
    return tuple(found)
