"""A Maglev table: which endpoint each entry leads to, so that one hash of a client finds its endpoint. Pure.

The rule: the table follows from who the endpoints are and what they weigh, never from their order, so every agent makes
the same one; and when an endpoint leaves, the entries of the others (nearly all of them) stay as they are.

Algorithm: D. Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), 3.4; turns
by weight as Envoy takes them (`maglev_lb.cc`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import count, cycle


def table(endpoints: Sequence[tuple[bytes, int]], size: int) -> list[int]:
    """The position in `endpoints` for each of `size` entries; `size` is a prime.

    `endpoints` are (identity, weight above 0). Each has entries in proportion to its weight, and at least one while
    there are no more endpoints than entries. Empty without endpoints.
    """
    order = sorted(range(len(endpoints)), key=endpoints.__getitem__)
    if not order:
        return []
    at, steps = [], []
    for number in order:
        digest = blake2b(endpoints[number][0], digest_size=16).digest()
        at.append(int.from_bytes(digest[:8], "little") % size)
        steps.append(int.from_bytes(digest[8:], "little") % (size - 1) + 1)
    found = [-1] * size
    left = size
    for turn in _turns([endpoints[number][1] for number in order]):
        entry, step = at[turn], steps[turn]
        while found[entry] >= 0:
            entry = (entry + step) % size
        found[entry] = order[turn]
        at[turn] = (entry + step) % size
        left -= 1
        if not left:
            break
    return found


def _turns(weights: list[int]) -> Iterator[int]:
    """Whose turn it is, for ever: the heaviest is due in every round, the others as often as they weigh beside it."""
    if len(set(weights)) == 1:
        yield from cycle(range(len(weights)))
    top, due = max(weights), [0] * len(weights)
    for turn in count(1):
        for which, weight in enumerate(weights):
            if turn * weight >= due[which]:
                due[which] += top
                yield which
