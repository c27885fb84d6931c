"""What a registered instance is, and every rule a registration must meet. Pure: no clock, no I/O, no memory.

`parse` turns an untrusted JSON body into an `Instance` or a `Refusal` that names the field. Nothing is ignored: an
unknown key is refused, so that a typing error cannot become a default. Every size is bounded here, because whoever
reaches the API could otherwise fill memory, the kernel's tables and our answers.

A port entry is `{"port": P, "protocol": "http", "servicePort": S}`: the instance listens on P, callers use S. Left out,
`protocol` is http and `servicePort` is P. `servicePort` matters for a service that only a registry knows; a service
declared in a file takes its ports from there and matches instances by port name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from meshbpf import durations
from meshbpf.model import Protocol

MAX_PORTS = 16
MAX_LABELS = 32
MAX_LABEL_KEY = 128
MAX_LABEL_VALUE = 256
MAX_ID = 128
MAX_CHECK = 1024
MAX_WEIGHT = 10_000
MIN_TTL = 1.0
MAX_TTL = 24 * 3600.0
DEFAULT_TTL = "10s"
DEFAULT_WEIGHT = 100

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Cloud metadata and control addresses that are no link-local addresses: an endpoint there would turn every caller of
# the service into somebody who asks the cloud for credentials.
METADATA: tuple[IPNetwork, ...] = (
    ipaddress.ip_network("100.100.100.200/32"),
    ipaddress.ip_network("168.63.129.16/32"),
    ipaddress.ip_network("192.0.0.192/32"),
    ipaddress.ip_network("fd00:ec2::254/128"),
    ipaddress.ip_network("fd20:ce::254/128"),
)
THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
# Wider than RFC 1123 by the colon: the default id is `address-port`, and the address may be IPv6.
_ID = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9.:_-]*[A-Za-z0-9])?", re.ASCII)
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?", re.ASCII)
_ZONE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62})?", re.ASCII)
_CHECK = re.compile(r"tcp|cmd(:.*)?|http:/.*", re.ASCII)
KEYS = frozenset({"address", "ports", "weight", "zone", "labels", "ttl", "check"})
PORT_KEYS = frozenset({"port", "protocol", "servicePort"})

ServiceId = tuple[str, str]  # (name, namespace)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a registration is refused: which field, and what would be right."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What depends on the machine: which addresses and ports no instance may have."""

    allow_loopback: bool = True
    own_ports: frozenset[int] = frozenset()
    service_networks: tuple[IPNetwork, ...] = ()  # the address pool: an endpoint there would call the mesh again
    service_addresses: frozenset[str] = frozenset()  # addresses that services name themselves


@dataclass(frozen=True, slots=True)
class InstancePort:
    port: int
    protocol: Protocol
    service_port: int


@dataclass(frozen=True, slots=True)
class Instance:
    service: ServiceId
    id: str
    address: str
    ports: Mapping[str, InstancePort]
    weight: int = DEFAULT_WEIGHT
    zone: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ttl: float = 10.0
    check: str = ""  # what the client checks before it heartbeats; for people, the registry runs nothing

    @property
    def key(self) -> tuple[str, str, str]:
        return (*self.service, self.id)

    def body(self) -> dict[str, Any]:
        """The JSON that `parse` would accept again."""
        return {
            "address": self.address,
            "ports": {
                name: {"port": port.port, "protocol": port.protocol.value, "servicePort": port.service_port}
                for name, port in self.ports.items()
            },
            "weight": self.weight,
            "zone": self.zone,
            "labels": dict(self.labels),
            "ttl": durations.render(self.ttl),
            "check": self.check,
        }


class _Bad(Exception):
    """Carries a Refusal out of nested checks; never leaves this file."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(where, message)


def parse_service(text: str) -> ServiceId | Refusal:
    """`name` or `name.namespace`, both RFC 1123 labels."""
    name, dot, namespace = text.partition(".")
    if not dot:
        namespace = "default"
    if not _LABEL.fullmatch(name) or not _LABEL.fullmatch(namespace):
        return Refusal("service", f"{text[:130]!r} is not name or name.namespace of lower-case letters, digits and '-'")
    return (name, namespace)


def parse(service: str, id: str, body: object, rules: Rules) -> Instance | Refusal:
    """The instance that `body` describes, or the first thing that is wrong with it."""
    identity = parse_service(service)
    if isinstance(identity, Refusal):
        return identity
    try:
        return _instance(identity, id, body, rules)
    except _Bad as bad:
        return bad.refusal


def _instance(service: ServiceId, id: str, body: object, rules: Rules) -> Instance:
    if len(id) > MAX_ID or not _ID.fullmatch(id):
        raise _Bad("id", f"must be letters, digits and '.:_-', at most {MAX_ID} of them")
    fields = _object("", body, KEYS)
    for needed in ("address", "ports"):
        if needed not in fields:
            raise _Bad(needed, "is missing")
    check = _text("check", fields.get("check", ""), MAX_CHECK)
    if check and not _CHECK.fullmatch(check):
        raise _Bad("check", "must be tcp, http:/PATH or cmd")
    zone = fields.get("zone", "")
    if not isinstance(zone, str) or not _ZONE.fullmatch(zone):
        raise _Bad("zone", "must be at most 63 letters, digits and '._-'")
    return Instance(
        service=service,
        id=id,
        address=_address(fields["address"], rules),
        ports=_ports(fields["ports"], rules),
        weight=_integer("weight", fields.get("weight", DEFAULT_WEIGHT), 0, MAX_WEIGHT),
        zone=zone,
        labels=_labels(fields.get("labels", {})),
        ttl=_ttl(fields.get("ttl", DEFAULT_TTL)),
        check=check,
    )


def _object(where: str, value: object, keys: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(where, "must be a JSON object")
    for key in value:
        if key not in keys:
            raise _Bad(f"{where}.{key[:64]}".lstrip("."), f"unknown field; known are {', '.join(sorted(keys))}")
    return value


def _text(where: str, value: object, limit: int) -> str:
    # isprintable also keeps out lone surrogates, which JSON may carry and neither SQLite nor UTF-8 can.
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise _Bad(where, f"must be at most {limit} printable characters")
    return value


def _integer(where: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _Bad(where, f"must be a whole number from {low} to {high}")
    return value


def _address(value: object, rules: Rules) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise _Bad("address", "must be an IPv4 or IPv6 address")
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise _Bad("address", f"{value!r} is no IPv4 or IPv6 address (names are not resolved)") from None
    if why := _never(address, rules):
        raise _Bad("address", f"{value} {why}")
    return str(address)


def _never(address: IPAddress, rules: Rules) -> str:
    """Why no instance may have this address; empty when it may."""
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address.sixtofour or address.teredo):
        return "hides an IPv4 address: write that one"
    if address.is_unspecified or (address.version == 4 and address in THIS_NETWORK):
        return "is the unspecified address"
    if address.is_multicast:
        return "is a multicast address"
    if address.is_link_local or any(address in network for network in METADATA if network.version == address.version):
        return "is a link-local or metadata address"
    if any(address in network for network in rules.service_networks if network.version == address.version):
        return "lies in the address pool of services"
    if str(address) in rules.service_addresses:
        return "is the address of a service"
    if address.is_loopback:  # before is_reserved, which is true for ::1
        return "" if rules.allow_loopback else "is a loopback address, which this registry does not allow"
    return "is a reserved address" if address.is_reserved else ""


def _ports(value: object, rules: Rules) -> Mapping[str, InstancePort]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_PORTS:
        raise _Bad("ports", f"must be an object of 1 to {MAX_PORTS} ports by name")
    ports: dict[str, InstancePort] = {}
    numbers: dict[tuple[int, bool], str] = {}
    for name in sorted(value):
        where = f"ports.{name[:64]}"
        if not _LABEL.fullmatch(name):
            raise _Bad(where, "a port's name must be lower-case letters, digits and '-'")
        entry = _object(where, value[name], PORT_KEYS)
        port = _integer(f"{where}.port", entry.get("port"), 1, 65535)
        if port in rules.own_ports:
            raise _Bad(f"{where}.port", f"{port} is a port of meshbpf itself")
        try:
            protocol = Protocol(entry.get("protocol", "http"))
        except ValueError:
            raise _Bad(f"{where}.protocol", f"must be one of {', '.join(Protocol)}") from None
        service_port = _integer(f"{where}.servicePort", entry.get("servicePort", port), 1, 65535)
        number = (service_port, protocol is Protocol.UDP)
        if number in numbers:
            raise _Bad(f"{where}.servicePort", f"{service_port} is already the service port of {numbers[number]}")
        numbers[number] = name
        ports[name] = InstancePort(port, protocol, service_port)
    return MappingProxyType(ports)


def _labels(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise _Bad("labels", f"must be an object of at most {MAX_LABELS} labels")
    for key, text in value.items():
        if len(key) > MAX_LABEL_KEY or not _LABEL_KEY.fullmatch(key):
            raise _Bad("labels", f"key {key[:64]!r} must be letters, digits and '._/-', at most {MAX_LABEL_KEY}")
        _text(f"labels.{key}", text, MAX_LABEL_VALUE)
    return MappingProxyType(dict(sorted(value.items())))


def _ttl(value: object) -> float:
    try:
        seconds = durations.parse(value) if isinstance(value, str) else 0.0
    except ValueError:
        seconds = 0.0
    if not MIN_TTL <= seconds <= MAX_TTL:
        raise _Bad("ttl", "must be a duration from 1s to 24h, such as 10s")
    return seconds
