"""Following another registry, with a clock of our own: what is asked and when, what stays, and whose fault is whose."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.model import Port, Protocol, Service
from meshbpf.registry import answer as answers
from meshbpf.registry.follower import MOST_PAUSE, WAIT, Follower, Question

URL = "http://198.51.100.7:15010"


def instance(id: str, address: str = "198.51.100.8", port: int = 8081, **more: Any) -> dict[str, Any]:
    ports = {"http": {"port": port, "protocol": "http", "servicePort": 80}}
    return {"id": id, "address": address, "ports": ports, "ttl": "10s", "expiresInMs": 9000, **more}


def said(generation: int, **services: list[dict[str, Any]]) -> dict[str, Any]:
    entries = [{"service": name.replace("_", "."), "instances": listed} for name, listed in services.items()]
    return {"schemaVersion": 1, "generation": generation, "problem": "", "services": entries}


def follower() -> Follower:
    return Follower(URL, allow_loopback=False)


def ids(follower: Follower, name: str = "orders") -> list[str]:
    """The endpoints, told apart by zone: endpoints have no ids."""
    return [e.zone for service in follower.snapshot.services if service.name == name for e in service.endpoints]


def test_instances_become_services_as_in_the_embedded_registry() -> None:
    one = follower()
    assert (one.snapshot.stale, one.snapshot.error) == (True, "has not answered yet")
    other = {"ports": {"web": {"port": 1, "servicePort": 80}, "grpc": {"port": 2, "protocol": "grpc"}}}
    one.answered(said(3, orders=[instance("z", weight=7), instance("a", **other)], cart_shop=[instance("c")]), 0.0)
    orders, cart = one.snapshot.services
    assert (orders.id, cart.id) == (("orders", "default"), ("cart", "shop"))
    assert orders.ports == (Port("grpc", 2, Protocol.GRPC), Port("http", 80, Protocol.HTTP)), "the oldest is right"
    assert [(dict(e.ports), e.weight, e.source) for e in orders.endpoints] == [
        ({"web": 1, "grpc": 2}, 100, URL),
        ({"http": 8081}, 7, URL),
    ]
    assert (one.snapshot.error, one.snapshot.stale, one.snapshot.allow_loopback) == ("", False, False)


def test_it_asks_plainly_first_and_after_every_failure_and_waits_otherwise() -> None:
    one = follower()
    assert one.question(0.0) == Question()
    one.answered(said(3), 0.0)
    assert one.question(0.0) == Question(WAIT, 3)
    one.failed("gone")
    assert one.question(0.0) == Question()
    one.answered(said(5), 0.0)
    assert one.question(0.0) == Question(WAIT, 5)


def test_ten_minutes_without_the_registry_change_nothing_but_the_error() -> None:
    one = follower()
    one.answered(said(3, orders=[instance("a", zone="a", ttl="10s")]), 0.0)
    before, now, tries = one.snapshot.services, 0.0, 0
    while now < 600.0:
        one.failed("cannot reach it")
        assert one.snapshot.services is before and one.snapshot.stale
        pause = one.pause(0.99)
        assert 0 < pause <= MOST_PAUSE
        now, tries = now + pause, tries + 1
    assert 300 <= tries < 340, "neither silent nor a hammer"
    one.answered(said(9, orders=[instance("b", zone="b")]), now)
    assert (ids(one), one.snapshot.error, one.snapshot.stale) == (["b"], "", False)
    assert one.pause(0.99) < 0.1


def test_pauses_grow_and_half_of_each_is_chance() -> None:
    one = follower()
    shortest, longest = [], []
    for _ in range(7):
        one.failed("gone")
        shortest.append(one.pause(0.0))
        longest.append(one.pause(1.0))
    assert longest == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert shortest == [most / 2 for most in longest]
    for _ in range(100_000):  # days of it
        one.failed("gone")
    assert one.pause(1.0) == 2.0


def test_what_did_not_change_stays_the_same_object() -> None:
    one = follower()
    one.answered(said(3, orders=[instance("a")], cart=[instance("c")]), 0.0)
    first = one.snapshot
    one.answered(said(3, orders=[instance("a", expiresInMs=1)], cart=[instance("c")]), 1.0)
    assert one.snapshot is first, "a heartbeat there is no news here"
    one.answered(said(4, orders=[instance("a", port=9)], cart=[instance("c")]), 2.0)
    cart, orders = one.snapshot.services
    assert cart is first.services[0] and orders != first.services[1]


def test_unknown_fields_are_a_later_version_and_mean_nothing() -> None:
    one = follower()
    newer = instance("a", state="new", ports={"http": {"port": 1, "tls": True}})
    one.answered({**said(3, orders=[newer]), "more": 1}, 0.0)
    assert (len(one.snapshot.services), one.snapshot.error) == (1, "")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (instance("b", address="orders.example"), "address: 'orders.example' is no IPv4 or IPv6 address"),
        (instance("b", address="169.254.169.254"), "address: 169.254.169.254 is a link-local or metadata address"),
        (instance("b", weight=-1), "weight: must be a whole number"),
        (instance("b c"), "id: must be letters"),
        ({"address": "198.51.100.8"}, "id: no text"),
        (instance("a"), "id: is there twice"),
        (instance("b", ports=[]), "ports: must be an object"),
        (instance("b", ports={"http": 7}), "ports.http: must be a JSON object"),
    ],
)
def test_one_bad_instance_is_left_out_and_named_and_the_others_count(bad: dict[str, Any], why: str) -> None:
    one = follower()
    one.answered(said(3, orders=[instance("a"), bad], cart=[instance("c")]), 0.0)
    assert [len(service.endpoints) for service in one.snapshot.services] == [1, 1]
    assert one.snapshot.error.startswith("1 instances left out, first orders.default/")
    assert why in one.snapshot.error
    assert not one.snapshot.stale
    one.answered(said(4, orders=[bad], cart=[instance("c")]), 1.0)
    assert "cart" in [service.name for service in one.snapshot.services]


GARBAGE: list[Any] = [
    {},
    {"generation": 1},
    {"services": []},
    {"generation": True, "services": []},
    {"generation": -1, "services": []},
    {"generation": 1e9, "services": []},
    {"generation": 10**400, "services": []},
    {"generation": 1, "services": {}},
    {"generation": 1, "services": [1]},
    {"generation": 1, "services": [{"service": 1, "instances": []}]},
    {"generation": 1, "services": [{"service": "Orders", "instances": []}]},
    {"generation": 1, "services": [{"service": "orders"}]},
    {"generation": 1, "services": [{"service": "orders", "instances": [1]}]},
    {"generation": 1, "services": [{"service": "a", "instances": []}, {"service": "a.default", "instances": []}]},
]


@pytest.mark.parametrize("answer", GARBAGE)
def test_what_no_registry_says_changes_nothing(answer: dict[str, Any]) -> None:
    one = follower()
    one.answered(said(3, orders=[instance("a")]), 0.0)
    before = one.snapshot.services
    one.answered(answer, 1.0)
    assert one.snapshot.services is before
    assert one.snapshot.stale and one.snapshot.error.startswith("answered what no registry says: ")
    assert one.question(2.0) == Question()


def test_an_answer_nested_as_deeply_as_can_be_is_refused() -> None:
    one = follower()
    deep: Any = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    twice: Any = []
    for _ in range(sys.getrecursionlimit()):
        twice = [twice]
    for labels in (deep, twice):
        one.answered(said(3, orders=[instance("a", labels=labels)]), 0.0)
    assert "nested too deeply" in one.snapshot.error and one.snapshot.stale


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
fields = st.sampled_from(["id", "address", "ports", "weight", "zone", "labels", "ttl", "check", "service", "instances"])
entries = st.lists(st.dictionaries(fields, json | st.lists(st.dictionaries(fields, json, max_size=4), max_size=3)))


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({"generation": st.integers(0, 9) | json, "services": entries | json}))
def test_nothing_that_can_be_said_raises(answer: dict[str, Any]) -> None:
    one = follower()
    one.answered(answer, 0.0)
    assert one.snapshot.source == URL


def test_more_than_a_registry_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_TOTAL", 2)
    one = follower()
    one.answered(said(3, a=[instance("1"), instance("2")]), 0.0)
    assert not one.snapshot.error
    one.answered(said(4, a=[instance("1"), instance("2")], b=[instance("3")]), 0.0)
    assert "more than the 2 instances" in one.snapshot.error
    assert [service.name for service in one.snapshot.services] == ["a"]


def test_a_registry_that_lost_its_memory_gets_time_to_hear_of_everybody_again() -> None:
    one = follower()
    one.answered(said(40, orders=[instance("a", zone="a"), instance("b", zone="b")], cart=[instance("c")]), 0.0)
    one.failed("it restarts")
    one.answered(said(1), 5.0)
    assert ids(one) == ["a", "b"] and len(one.snapshot.services) == 2
    assert (one.snapshot.error, one.snapshot.stale) == ("", False)
    assert one.question(5.0) == Question(10.0, 1), "when the first of them goes is looked at again"
    one.answered(said(2, orders=[instance("b", zone="b2")]), 6.0)
    assert ids(one) == ["a", "b2"], "who is back is as he says now"
    one.answered(said(2, orders=[instance("b", zone="b2")]), 15.1)
    assert ids(one) == ["b2"] and len(one.snapshot.services) == 1, "who did not come back within his grace is gone"
    assert one.question(15.1) == Question(WAIT, 2)
    one.answered(said(3), 16.0)
    assert not one.snapshot.services, "from here on its word counts as ever"


def test_a_registry_that_remembers_is_believed_after_an_outage() -> None:
    one = follower()
    one.answered(said(40, orders=[instance("a", zone="a"), instance("b", zone="b")]), 0.0)
    one.failed("it restarts")
    one.answered(said(41, orders=[instance("b", zone="b")]), 5.0)
    assert ids(one) == ["b"]


def test_when_too_many_wait_there_it_looks_from_time_to_time() -> None:
    one = follower()
    one.answered(said(3, orders=[instance("a")]), 0.0)
    for generation in range(4, 8):
        assert one.question(0.0).wait == WAIT
        one.crowded()
        assert MOST_PAUSE / 2 <= one.pause(0.5) <= MOST_PAUSE
        assert one.question(0.0) == Question()
        one.answered(said(generation, orders=[instance("a")]), 0.0)
        assert (one.snapshot.error, one.snapshot.stale) == ("", False)


def test_who_answers_at_once_without_news_is_asked_from_time_to_time() -> None:
    one = follower()
    one.answered(said(3), 0.0)
    for now, generation, seldom in ((0.0, 3, True), (2.0, 3, True), (4.0, 4, False), (5.0, 4, True)):
        assert one.question(now).wait == WAIT
        one.answered(said(generation), now + 0.5)
        assert (one.pause(0.0) >= MOST_PAUSE / 2) is seldom
    assert one.question(10.0).wait == WAIT
    one.answered(said(4), 10.0 + WAIT)
    assert one.pause(0.0) < 0.1, "waited, and nothing happened there"


def test_a_large_registry_is_asked_less_often() -> None:
    one = follower()
    many = itertools.count()
    one.answered(said(3, orders=[instance(f"i{next(many)}") for _ in range(5000)]), 0.0)
    assert one.pause(0.5) == 0.25


def test_services_are_sorted_whatever_the_order_of_the_answer() -> None:
    one = follower()
    one.answered(said(3, z_a=[instance("1")], b=[instance("1")], a_z=[instance("1")], a=[instance("1")]), 0.0)
    found: tuple[Service, ...] = one.snapshot.services
    assert [service.label for service in found] == ["z.a", "a", "b", "a.z"]
