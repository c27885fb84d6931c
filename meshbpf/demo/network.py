"""The demo's network: one namespace per part and one with the bridge that joins them. Made and removed here only."""

from __future__ import annotations

import ipaddress

from meshbpf.demo import cast, plumbing


def make() -> None:
    """Every part can reach every other one, and nothing else. Raises MeshError."""
    hub = cast.namespace("net")
    parts = {cast.namespace(part): address for part, address in cast.PARTS.items()}
    for name in (hub, *parts):
        plumbing.create(name)
    plumbing.join(hub, parts, ipaddress.ip_network(cast.NETWORK).prefixlen)


def remove() -> list[str]:
    """Every namespace of a demo, this one's or a killed one's; the names that were there. Raises MeshError."""
    found = sorted(path.name for path in plumbing.NAMED.glob(cast.PREFIX + "-*"))
    for name in found:
        plumbing.remove(name)
    return found
