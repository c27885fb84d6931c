"""Leases: a lease ends at its TTL and not before; generations tell readers what they can see; bad input is named."""

from __future__ import annotations

import ipaddress
import random
from typing import Any

import pytest

from meshbpf.registry import leases as module
from meshbpf.registry.instance import Instance, Refusal, Rules, parse, parse_service
from meshbpf.registry.leases import Leases, remaining_after_restart

ORDERS = ("orders", "default")


def body(**changes: Any) -> dict[str, Any]:
    return {"address": "127.0.0.1", "ports": {"http": {"port": 8081}}, **changes}


def instance(id: str = "a", service: str = "orders", **changes: Any) -> Instance:
    parsed = parse(service, id, body(**changes), Rules())
    assert isinstance(parsed, Instance), parsed
    return parsed


def refused(rules: Rules | None = None, id: str = "a", service: str = "orders", **changes: Any) -> str:
    parsed = parse(service, id, body(**changes), rules or Rules())
    assert isinstance(parsed, Refusal), parsed
    assert parsed.message
    return parsed.field


def test_a_lease_ends_at_its_ttl_and_not_before() -> None:
    leases = Leases()
    leases.put(instance(ttl="10s"), now=100.0)
    assert leases.deadline() == 110.0
    assert leases.expire(109.999) == ()
    assert [gone.id for gone in leases.expire(110.0)] == ["a"]
    assert leases.deadline() is None
    assert len(leases) == 0


def test_a_heartbeat_moves_the_end_and_an_ended_lease_stays_ended() -> None:
    leases = Leases()
    leases.put(instance(ttl="10s"), now=0.0)
    assert leases.heartbeat(ORDERS, "a", 9.0) is not None
    assert leases.expire(10.0) == ()
    assert leases.deadline() == 19.0
    assert leases.heartbeat(ORDERS, "a", 19.0) is None, "ended, although nobody has called expire yet"
    assert len(leases.expire(19.0)) == 1
    assert leases.heartbeat(ORDERS, "a", 19.0) is None
    assert leases.heartbeat(("other", "default"), "a", 0.0) is None


def test_put_creates_then_renews_and_only_a_change_moves_generations() -> None:
    leases = Leases()
    first = leases.put(instance(), 0.0)
    assert not isinstance(first, Refusal)
    assert (first.created, first.changed, leases.generation) == (True, True, 1)
    again = leases.put(instance(), 5.0)
    assert not isinstance(again, Refusal)
    assert (again.created, again.changed, leases.generation) == (False, False, 1)
    assert again.lease.deadline == 15.0
    changed = leases.put(instance(weight=7), 5.0)
    assert not isinstance(changed, Refusal)
    assert (changed.created, changed.changed, leases.generation) == (False, True, 2)
    leases.heartbeat(ORDERS, "a", 6.0)
    assert leases.generation == 2


def test_a_shorter_ttl_brings_the_end_forward() -> None:
    leases = Leases()
    leases.put(instance(ttl="24h"), 0.0)
    leases.put(instance(ttl="1s"), 0.0)
    assert leases.deadline() == 1.0
    assert len(leases.expire(1.0)) == 1


def test_delete_and_expiry_leave_a_generation_to_wait_on() -> None:
    leases = Leases()
    assert leases.generation_of(ORDERS) == 0
    leases.put(instance("a"), 0.0)
    leases.put(instance("x", service="other"), 0.0)
    assert (leases.generation_of(ORDERS), leases.generation_of(("other", "default"))) == (1, 2)
    assert leases.delete(ORDERS, "a") is not None
    assert leases.delete(ORDERS, "a") is None
    assert leases.generation_of(ORDERS) == leases.generation == 3
    assert leases.services() == [("other", "default")]


def test_expiry_of_many_changes_each_service_once() -> None:
    leases = Leases()
    for number in range(5):
        leases.put(instance(str(number)), 0.0)
    before = leases.generation
    assert len(leases.expire(10.0)) == 5
    assert leases.generation == before + 1


def test_the_oldest_comes_first_and_a_renewal_does_not_make_older() -> None:
    leases = Leases()
    leases.put(instance("b"), 0.0)
    leases.put(instance("a"), 1.0)
    leases.put(instance("b", weight=3), 2.0)
    assert [lease.instance.id for lease in leases.of(ORDERS)] == ["b", "a"]


def test_room_is_bounded_per_service_and_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PER_SERVICE", 2)
    monkeypatch.setattr(module, "MAX_TOTAL", 3)
    leases = Leases()
    for id in ("a", "b"):
        leases.put(instance(id), 0.0)
    assert isinstance(leases.put(instance("c"), 0.0), Refusal)
    assert not isinstance(leases.put(instance("b"), 0.0), Refusal), "renewing needs no room"
    leases.put(instance("a", service="other"), 0.0)
    assert isinstance(leases.put(instance("a", service="third"), 0.0), Refusal)


def test_remembered_ends_and_outdated_deadlines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GONE", 3)
    leases = Leases()
    for number in range(10):
        leases.put(instance(service=f"s{number}"), 0.0)
        leases.delete((f"s{number}", "default"), "a")
    assert len(leases._gone) == 3
    for round in range(500):
        leases.put(instance(ttl="24h"), float(2 * round))
        leases.deadline()
        leases.expire(2.0 * round + 1.5)
        leases.put(instance(ttl="1s"), 2.0 * round + 1.5)
    assert len(leases._heap) < 100


def test_against_a_naive_model() -> None:
    dice = random.Random(7)
    leases, model, now = Leases(), dict[str, float](), 0.0
    for _ in range(5000):
        now += dice.choice([0.0, 0.1, 0.5, 2.0])
        id, ttl = dice.choice("abcdefgh"), dice.choice([1, 3, 20])
        expected = {key for key, deadline in model.items() if deadline <= now}
        assert {gone.id for gone in leases.expire(now)} == expected
        model = {key: deadline for key, deadline in model.items() if deadline > now}
        match dice.randrange(3):
            case 0:
                leases.put(instance(id, ttl=f"{ttl}s"), now)
                model[id] = now + ttl
            case 1:
                lease = leases.heartbeat(ORDERS, id, now)
                assert (lease is not None) == (id in model)
                if lease is not None:
                    model[id] = lease.deadline
            case _:
                assert (leases.delete(ORDERS, id) is not None) == (model.pop(id, None) is not None)
        assert leases.deadline() == min(model.values(), default=None)


@pytest.mark.parametrize(
    ("ttl", "left", "expected"),
    [
        ("10s", 8.0, 10.0),  # the grace of a short lease is its whole TTL
        ("10s", -3600.0, 10.0),  # away for an hour: nobody could renew
        ("1s", 0.5, 1.0),  # never more than the TTL
        ("1h", 3000.0, 3000.0),  # the rest of a long lease is kept
        ("1h", 100.0, 1800.0),  # at least half of it, in which every client heartbeats
        ("1h", 99999.0, 3600.0),  # the wall clock went backwards
    ],
)
def test_a_restart_keeps_the_rest_of_a_lease_but_at_least_a_grace(ttl: str, left: float, expected: float) -> None:
    assert remaining_after_restart(instance(ttl=ttl), 1000.0 + left, wall=1000.0) == pytest.approx(expected)


def test_restored_leases_run_on_and_count_as_one_change() -> None:
    leases = Leases(generation=41)
    leases.restore([(instance("a"), 3.0), (instance("b"), 10.0)], now=50.0)
    assert leases.generation == leases.generation_of(ORDERS) == 42
    assert leases.deadline() == 53.0


def test_defaults_and_the_way_back() -> None:
    parsed = instance(
        "127.0.0.1-8081", service="orders.shop", zone="a", labels={"version": "v1"}, check="http:/healthz"
    )
    assert parsed.key == ("orders", "shop", "127.0.0.1-8081")
    assert (parsed.weight, parsed.ttl, parsed.ports["http"].service_port) == (100, 10.0, 8081)
    assert parse("orders.shop", parsed.id, parsed.body(), Rules()) == parsed


@pytest.mark.parametrize("ttl", ["1s", "24h", "1500ms", "1h30m", "86399s999ms"])
def test_every_ttl_survives_the_way_back(ttl: str) -> None:
    parsed = instance(ttl=ttl)
    assert parse("orders", "a", parsed.body(), Rules()) == parsed


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("nonsense", {"nonsense": 1}),
        ("address", {"address": "localhost"}),
        ("address", {"address": 5}),
        ("address", {"address": "0.0.0.0"}),
        ("address", {"address": "0.1.2.3"}),
        ("address", {"address": "::"}),
        ("address", {"address": "169.254.169.254"}),
        ("address", {"address": "fe80::1%eth0"}),
        ("address", {"address": "fd00:ec2::254"}),
        ("address", {"address": "100.100.100.200"}),
        ("address", {"address": "224.0.0.1"}),
        ("address", {"address": "255.255.255.255"}),
        ("address", {"address": "::ffff:127.0.0.1"}),
        ("address", {"address": "::ffff:169.254.169.254"}),
        ("address", {"address": "2002:a9fe:a9fe::1"}),
        ("ports", {"ports": {}}),
        ("ports", {"ports": {f"p{number}": {"port": 1000 + number} for number in range(17)}}),
        ("ports.HTTP", {"ports": {"HTTP": {"port": 1}}}),
        ("ports.http", {"ports": {"http": 8081}}),
        ("ports.http.port", {"ports": {"http": {}}}),
        ("ports.http.port", {"ports": {"http": {"port": 0}}}),
        ("ports.http.port", {"ports": {"http": {"port": 65536}}}),
        ("ports.http.port", {"ports": {"http": {"port": "80"}}}),
        ("ports.http.port", {"ports": {"http": {"port": True}}}),
        ("ports.http.protocol", {"ports": {"http": {"port": 1, "protocol": "quic"}}}),
        ("ports.http.protocol", {"ports": {"http": {"port": 1, "protocol": []}}}),
        ("ports.http.servicePort", {"ports": {"http": {"port": 1, "servicePort": 0}}}),
        ("ports.http.x", {"ports": {"http": {"port": 1, "x": 0}}}),
        ("ports.b.servicePort", {"ports": {"a": {"port": 1, "servicePort": 80}, "b": {"port": 2, "servicePort": 80}}}),
        ("weight", {"weight": -1}),
        ("weight", {"weight": 10_001}),
        ("weight", {"weight": 1.5}),
        ("zone", {"zone": "a b"}),
        ("zone", {"zone": ["a"]}),
        ("labels", {"labels": []}),
        ("labels", {"labels": {f"k{number}": "v" for number in range(33)}}),
        ("labels", {"labels": {"a b": "v"}}),
        ("labels.k", {"labels": {"k": "x" * 257}}),
        ("labels.k", {"labels": {"k": "line\nbreak"}}),
        ("labels.k", {"labels": {"k": "\ud800"}}),
        ("labels.k", {"labels": {"k": 1}}),
        ("ttl", {"ttl": "999ms"}),
        ("ttl", {"ttl": "24h1s"}),
        ("ttl", {"ttl": "soon"}),
        ("ttl", {"ttl": 10}),
        ("check", {"check": "ping"}),
        ("check", {"check": "http:healthz"}),
        ("check", {"check": "cmd:" + "x" * 1100}),
    ],
)
def test_bad_input_names_its_field(field: str, changes: dict[str, Any]) -> None:
    assert refused(**changes) == field


def test_names_and_shape() -> None:
    for name in ("", "Orders", "a_b", "-a", "a.b.c", "a.", "x" * 64, "a\n", "ａ"):
        assert isinstance(parse_service(name), Refusal), name
    assert parse_service("a.b") == ("a", "b")
    for id in ("", "a b", "a/b", "x" * 129, "a\n", "é"):
        assert refused(id=id) == "id"
    assert instance("::1-8080").id == "::1-8080"
    assert isinstance(missing := parse("a", "a", {"address": "127.0.0.1"}, Rules()), Refusal)
    assert missing.field == "ports"
    assert isinstance(parse("a", "a", [], Rules()), Refusal)


def test_what_depends_on_the_machine() -> None:
    rules = Rules(
        allow_loopback=False,
        own_ports=frozenset({15001}),
        service_networks=(ipaddress.ip_network("198.51.100.0/24"),),
        service_addresses=frozenset({"203.0.113.1"}),
    )
    for address in ("127.0.0.1", "::1", "198.51.100.4", "203.0.113.1"):
        assert refused(rules, address=address) == "address"
    assert refused(rules, address="192.0.2.1", ports={"http": {"port": 15001}}) == "ports.http.port"
    assert isinstance(parse("orders", "a", body(address="192.0.2.1"), rules), Instance)
    assert instance(address="::1").address == "::1"
