"""Which address of the pool a service gets. Pure; `store` remembers the choice, so that it never changes.

The name alone suggests the address, so machines that never talk to each other agree, but for collisions; a collision
takes the next free address, which is why the choice must be remembered.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping

from meshbpf.errors import MeshError
from meshbpf.registry.instance import IPNetwork, ServiceId


class PoolFull(MeshError):
    """Every address of the pool is taken."""


def choose_address(pool: IPNetwork, service: ServiceId, taken: Collection[str]) -> str:
    """The first free address from where the name's hash points. Raises PoolFull."""
    size = pool.num_addresses
    first, usable = (1, size - 2) if size > 2 else (0, size)  # never the network's own nor its broadcast address
    digest = hashlib.sha256(f"{service[0]}.{service[1]}".encode()).digest()
    start = int.from_bytes(digest[:16], "big") % usable
    # Among len(taken) + 1 candidates one is free, unless the pool has no more of them.
    for step in range(min(usable, len(taken) + 1)):
        address = str(pool[first + (start + step) % usable])
        if address not in taken:
            return address
    raise PoolFull(f"all {usable} addresses of {pool} are taken: widen Agent.spec.addressPool")


def assign(
    pool: IPNetwork, services: Iterable[ServiceId], given: Mapping[ServiceId, str], avoid: Collection[str] = ()
) -> dict[ServiceId, str]:
    """`given`, as far as it still holds, and an address for each of `services` that has none. Raises PoolFull.

    An address once given stays, also while its service is gone; `avoid` are addresses that services name themselves.
    """
    mapping = still_good(pool, given, avoid)
    taken = {*avoid, *mapping.values()}
    for service in sorted(set(services) - mapping.keys()):
        mapping[service] = choose_address(pool, service, taken)
        taken.add(mapping[service])
    return mapping


def still_good(pool: IPNetwork, given: Mapping[ServiceId, str], avoid: Collection[str] = ()) -> dict[ServiceId, str]:
    """`given` without what somebody now names himself and what lies outside of a pool that was changed."""
    return {
        service: address
        for service, address in given.items()
        if address not in avoid and ipaddress.ip_address(address) in pool
    }
