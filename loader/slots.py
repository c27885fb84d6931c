"""Which endpoint each slot of a service port names: a round of turns by weight, or Maglev tables. Pure.

The rule: an IPv4 socket picks from a part of the slots that has no IPv6 endpoint in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loader import abi
from meshbpf.model import Balance, Endpoint, LoadBalancer
from meshbpf.policy import maglev

MAX_SHARES = 100
IDENTITY = abi.EndpointValue.draining.offset  # an endpoint's address and port
MAPPED = b"\0" * 10 + b"\xff\xff"


def shares(weights: list[int]) -> list[int]:
    """Weights as small whole shares: divided by their greatest common divisor, scaled to at most MAX_SHARES."""
    if len(set(weights)) == 1:
        return [1 if weights[0] else 0] * len(weights)
    divisor = math.gcd(*weights) if weights else 1
    reduced = [weight // divisor for weight in weights] if divisor else list(weights)
    top = max(reduced, default=0)
    if top > MAX_SHARES:
        reduced = [max(1, round(share * MAX_SHARES / top)) if share else 0 for share in reduced]
    return reduced


def interleave(counts: list[int]) -> list[int]:
    """Indices, each as often as its count, spread evenly: the n-th turn of a count stands at (n - 1/2) / count."""
    if set(counts) == {1}:
        return list(range(len(counts)))
    turns = [((2 * turn + 1) / count, index) for index, count in enumerate(counts) for turn in range(count)]
    return [index for _when, index in sorted(turns)]


@dataclass(frozen=True, slots=True)
class Spread:
    """The slots of a service port, as keys of endpoints; the first `ipv4` of them are what an IPv4 socket can reach."""

    slots: list[bytes]
    ipv4: int
    pick: abi.Pick


def spread(picked: list[tuple[bytes, bytes, int]], policy: LoadBalancer) -> Spread:
    """`picked`: key, value and weight of the endpoints that take new connections."""
    if policy.consistent_hash.use_source_ip:
        return _hashed(picked, policy.consistent_hash.maglev.table_size)
    turns = [picked[which] for which in interleave(shares([weight for _key, _value, weight in picked]))]
    four = [key for key, value, _weight in turns if is_ipv4(value)]  # first, and each family still spread evenly
    six = [key for key, value, _weight in turns if not is_ipv4(value)] if len(four) < len(turns) else []
    pick = abi.Pick.RANDOM if policy.simple is Balance.RANDOM else abi.Pick.ROUND_ROBIN
    return Spread(four + six, len(four), pick)


def slots_of(endpoints: list[Endpoint], policy: LoadBalancer) -> int:
    """How many slots `spread` gives the endpoints that take new connections."""
    if policy.consistent_hash.use_source_ip:
        tables = (0, 1, 3)[len({":" in endpoint.address for endpoint in endpoints})]
        return tables * policy.consistent_hash.maglev.table_size
    return sum(shares([endpoint.weight for endpoint in endpoints]))


def _hashed(picked: list[tuple[bytes, bytes, int]], size: int) -> Spread:
    """Maglev tables. IPv4 sockets have one of their own: in the one for all, entries would have to be skipped for them,
    and with an endpoint those entries would move that are not its own.
    """
    four = [endpoint for endpoint in picked if is_ipv4(endpoint[1])]
    six = [endpoint for endpoint in picked if not is_ipv4(endpoint[1])]
    both = (four, six, picked) if four and six else (picked,)
    slots = []
    for part in both:
        found = maglev.table([(value[:IDENTITY], weight) for _key, value, weight in part], size)
        slots += [part[which][0] for which in found]
    return Spread(slots, size if four else 0, abi.Pick.HASH_OF_BOTH if four and six else abi.Pick.HASH)


def is_ipv4(value: bytes) -> bool:
    return value.startswith(MAPPED)
