"""The pool: stable, free of duplicates, and honest when it is full."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.registry.pool import PoolFull, assign, choose_address, still_good

POOL = ipaddress.ip_network("127.96.0.0/26")
IDS = st.tuples(st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z0-9]", fullmatch=True), st.sampled_from(["default", "shop"]))
ROUNDS = st.lists(st.sets(IDS, max_size=12), min_size=1, max_size=4)
AVOID = st.sets(st.integers(1, 62).map(lambda number: str(POOL[number])), max_size=10)


@given(ROUNDS, AVOID)
def test_an_address_never_changes_and_no_two_services_share_one(
    rounds: list[set[tuple[str, str]]], avoid: set[str]
) -> None:
    mapping: dict[tuple[str, str], str] = {}
    for services in rounds:
        before = dict(mapping)
        mapping = assign(POOL, services, mapping, avoid)
        assert before.items() <= mapping.items()
        assert mapping.keys() == before.keys() | services
    addresses = [ipaddress.ip_address(address) for address in mapping.values()]
    assert len(set(addresses)) == len(addresses)
    assert not {str(address) for address in addresses} & avoid
    assert all(address in POOL for address in addresses)
    assert POOL.network_address not in addresses
    assert POOL.broadcast_address not in addresses


@given(st.sets(IDS, max_size=30))
def test_the_order_of_services_does_not_matter(services: set[tuple[str, str]]) -> None:
    in_order = sorted(services)
    assert assign(POOL, in_order, {}) == assign(POOL, reversed(in_order), {})


def test_the_name_alone_decides_in_an_empty_pool() -> None:
    """Machines that never talked agree; these values may never change, because stores and people remember them."""
    pool = ipaddress.ip_network("127.96.0.0/16")
    assert choose_address(pool, ("orders", "default"), ()) == "127.96.57.15"
    assert choose_address(pool, ("orders", "shop"), ()) == "127.96.98.53"
    assert assign(pool, [("orders", "default")], {}) == {("orders", "default"): "127.96.57.15"}


def test_a_collision_takes_the_next_free_address_and_goes_around_the_end() -> None:
    tiny = ipaddress.ip_network("127.96.0.0/29")
    found = assign(tiny, [(f"s{number}", "default") for number in range(6)], {})
    assert sorted(found.values()) == [f"127.96.0.{number}" for number in range(1, 7)]


def test_a_full_pool_names_the_field_to_change() -> None:
    tiny = ipaddress.ip_network("127.96.0.0/30")
    with pytest.raises(PoolFull) as caught:
        assign(tiny, [("a", "x"), ("b", "x"), ("c", "x")], {})
    assert str(caught.value) == "all 2 addresses of 127.96.0.0/30 are taken: widen Agent.spec.addressPool"


def test_what_is_given_is_kept_for_services_that_are_gone_but_not_against_files_or_another_pool() -> None:
    given_before = {
        ("gone", "x"): "127.96.0.1",
        ("claimed", "x"): "127.96.0.2",
        ("outside", "x"): "127.99.0.1",
    }
    assert still_good(POOL, given_before, {"127.96.0.2"}) == {("gone", "x"): "127.96.0.1"}
    after = assign(POOL, given_before, given_before, {"127.96.0.2"})
    assert after["gone", "x"] == "127.96.0.1"
    assert after["claimed", "x"] != "127.96.0.2"
    assert ipaddress.ip_address(after["outside", "x"]) in POOL
