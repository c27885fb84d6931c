"""Which addresses a mesh may use, and which are our own. Pure; the files' checks, the merge and the registry ask here.

Rules: an endpoint or service is never link-local, metadata, multicast or unspecified; an endpoint is never one of our
own ports (the mesh would call itself); addresses are compared in their canonical text.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from meshbpf.model import Agent, Protocol

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Every instance of meshbpf on this machine may use these on loopback: proxy outbound, inbound, registry, admin.
OWN_PORTS = frozenset({15001, 15006, 15010, 15020})

# Cloud metadata and platform services outside of link-local: AWS (IPv6), GCP (IPv6), Alibaba, Oracle, Azure.
_METADATA = frozenset({"fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"})

# Every merge asks the same of every endpoint, and parsing an address is most of the cost: IPv4 is told by its text.
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_BYTE}(\.{_BYTE}){{3}}", re.ASCII)
_SUSPICION = r"0\.|169\.254\.|2(2[4-9]|3[0-9])\.|255\."  # what `_unusable` has to look at
_SUSPECT = re.compile(_SUSPICION, re.ASCII)
_ORDINARY = re.compile(rf"(?!{_SUSPICION}|100\.100\.|192\.0\.0\.|168\.63\.){_IPV4.pattern}", re.ASCII)
_remembered = lru_cache(maxsize=65536)


def canonical(text: str) -> str:
    """The one spelling of an IP address. ValueError says what is wrong, to follow "must be"."""
    if _IPV4.fullmatch(text):
        return text
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address (names are not resolved)") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ValueError("an address without zone")
        if address.ipv4_mapped is not None:
            raise ValueError(f"written as IPv4: {address.ipv4_mapped}")
    return str(address)


def ordinary(text: str) -> bool:
    """Whether this is a canonical IPv4 address that is not `unusable`; of some that are, that is not said."""
    return _ORDINARY.fullmatch(text) is not None


def unusable(address: str) -> str:
    """Why no service and no endpoint may have this canonical address; empty when it may."""
    if ":" in address or address in _METADATA or _SUSPECT.match(address):
        return _unusable(address)
    return ""


@_remembered
def _unusable(address: str) -> str:
    ip = ipaddress.ip_address(address)
    if address in _METADATA or address == "169.254.169.254":
        return "a metadata address of the platform"
    if ip.is_unspecified or (ip.version == 4 and ip in ipaddress.ip_network("0.0.0.0/8")):
        return "an unspecified address"
    if ip.is_link_local:
        return "a link-local address"
    if ip.is_multicast:
        return "a multicast address"
    if address == "255.255.255.255":
        return "the broadcast address"
    return ""


def is_loopback(address: str) -> bool:
    """Whether this canonical address is one of this machine's own."""
    return address.startswith("127.") or address == "::1"


def split(listen: str) -> tuple[str, int]:
    """`host:port` or `[host]:port` with a canonical host. ValueError says what is wrong, to follow "must be"."""
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("ADDRESS:PORT with an IPv6 address in brackets")
    if (
        not colon
        or not host
        or not (port.isascii() and port.isdigit() and len(port) <= 5)
        or not 1 <= int(port) <= 65535
    ):
        raise ValueError("ADDRESS:PORT, for example 127.0.0.1:15020 (0.0.0.0 for every address)")
    return canonical(host), int(port)


def joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def layer4(protocol: Protocol) -> str:
    """Ports of TCP and UDP are counted apart."""
    return "udp" if protocol is Protocol.UDP else "tcp"


@lru_cache(maxsize=16)
def listeners(agent: Agent) -> tuple[tuple[str, str, int], ...]:
    """(field, address, port) of everything the agent listens on."""
    ours = (("proxy.listen", *split(agent.proxy.listen)), ("admin.listen", *split(agent.admin.listen)))
    if agent.embedded is None:
        return ours
    return (*ours, ("registries.embedded.listen", *split(agent.embedded.listen)))


@lru_cache(maxsize=16)
def suspect_ports(agent: Agent) -> frozenset[int]:
    """Only one of these can be `our_listener` or `our_port`. (To hash an agent costs more than to ask here first.)"""
    return OWN_PORTS | {port for _field, _host, port in listeners(agent)}


def our_listener(address: str, port: int, agent: Agent) -> str:
    """Which of our listeners answers at this address and port; empty when none."""
    for field, host, own in listeners(agent):
        if own != port:
            continue
        # The proxy answers on both loopback addresses, a listener on every address on all of loopback.
        everywhere = host in ("0.0.0.0", "::") and is_loopback(address)
        proxy = field == "proxy.listen" and address in ("127.0.0.1", "::1")
        if host == address or everywhere or proxy:
            return f"Agent.spec.{field}"
    return "a port of meshbpf" if address in ("127.0.0.1", "::1") and port in OWN_PORTS else ""


def our_port(address: str, port: int, agent: Agent) -> str:
    """As `our_listener`, for an endpoint: our port numbers are refused on all of loopback, whoever listens there."""
    if (field := our_listener(address, port, agent)) != "":
        return field
    return "a port of meshbpf" if is_loopback(address) and port in OWN_PORTS else ""
