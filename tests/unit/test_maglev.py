"""The Maglev table: shares by weight, the same for everybody, and little disturbed by who comes and goes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.policy.maglev import table

SIZE = 1021
Endpoints = list[tuple[bytes, int]]


def endpoints(most: int, weights: st.SearchStrategy[int]) -> st.SearchStrategy[Endpoints]:
    names = st.binary(min_size=6, max_size=18)
    return st.lists(st.tuples(names, weights), min_size=2, max_size=most, unique_by=lambda endpoint: endpoint[0])


def owners(found: Endpoints, size: int = SIZE) -> list[bytes]:
    return [found[which][0] for which in table(found, size)]


def strays(found: Endpoints, gone: tuple[bytes, int]) -> float:
    """The share of entries that move although they were not of the endpoint that left."""
    before, after = owners(found), owners([endpoint for endpoint in found if endpoint != gone])
    return sum(old not in (new, gone[0]) for old, new in zip(before, after, strict=True)) / SIZE


@settings(deadline=None)
@given(endpoints(20, st.just(100)), st.data())
def test_who_leaves_moves_little_more_than_its_own(found: Endpoints, data: st.DataObject) -> None:
    """A remainder would move a third and more. Two endpoints that walk the table in step can lose a seventh."""
    assert strays(found, data.draw(st.sampled_from(found))) < 1 / 4
    shares = Counter(owners(found))
    assert max(shares.values()) - min(shares.values()) <= 1


@pytest.mark.parametrize("number", [3, 10, 30])
def test_how_little_that_is_for_neighbours_in_one_network(number: int) -> None:
    found = [(bytes([10, 0, 0, last]), 100) for last in range(number)]
    every = [strays(found, gone) for gone in found]
    assert sum(every) / number < 0.05
    assert max(every) < 0.1


@settings(deadline=None)
@given(endpoints(10, st.integers(1, 10_000)))
def test_shares_follow_the_weights(found: Endpoints) -> None:
    shares, total = Counter(owners(found)), sum(weight for _name, weight in found)
    for name, weight in found:
        assert shares[name] >= 1
        # The turns of a round are whole: each round can favour an endpoint by one, and all have one in the first.
        assert abs(shares[name] - SIZE * weight / total) <= len(found)


@settings(deadline=None)
@given(endpoints(10, st.integers(1, 9)), st.data())
def test_the_order_of_the_endpoints_is_nobody_s_business(found: Endpoints, data: st.DataObject) -> None:
    assert owners(data.draw(st.permutations(found))) == owners(found)


def test_a_heavier_endpoint_takes_over_and_nobody_else_does() -> None:
    names = [b"a", b"b", b"c", b"d"]
    before = owners([(name, 100) for name in names])
    after = owners([(name, 200 if name == b"a" else 100) for name in names])
    shares = Counter(after)
    assert [shares[name] for name in names] == [408, 205, 204, 204]
    stray = sum(new not in (old, b"a") for old, new in zip(before, after, strict=True))
    assert stray < SIZE / 10


def test_none_and_one_and_more_than_there_are_entries() -> None:
    assert table([], 7) == []
    assert table([(b"a", 3)], 7) == [0] * 7
    assert len(set(table([(bytes([n]), 1) for n in range(9)], 7))) == 7
