"""`meshbpf diff`: what is different between two meshes, what registries said stays, and equal is equal."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from loader.plan import TABLES, Tables, plan
from meshbpf.cli.changes import changes
from meshbpf.cli.diff import after, writes
from meshbpf.errors import MapFull
from meshbpf.model import (
    AccessLogPolicy,
    Agent,
    EmbeddedRegistry,
    Endpoint,
    EndpointState,
    MapSizes,
    Mesh,
    Mode,
    OnProxyDown,
    Port,
    Protocol,
    ProxySettings,
    Service,
    ServicePolicy,
    Timeouts,
)
from meshbpf.registry.pool import choose_address
from tests.support.meshes import meshes

HTTP = (Port("main", 80, Protocol.HTTP),)
ORDERS = Service(
    "orders", addresses=("127.96.0.10",), ports=HTTP,
    endpoints=(Endpoint("127.0.0.1", {"main": 8081}, source="mesh.yaml:8:5"),), source="mesh.yaml:3:1",
)  # fmt: skip
OLD = Mesh(services=(ORDERS,))


def seen(old: Mesh, new: Mesh) -> list[tuple[Any, ...]]:
    keys = ("change", "kind", "name", "field", "before", "after", "affects")
    return [tuple(row[key] for key in keys) for row in changes(old, new)]


def orders(**fields: Any) -> Mesh:
    return Mesh(services=(replace(ORDERS, **fields),))


def governed(**fields: Any) -> Mesh:
    return Mesh(services=(ORDERS,), policies={ORDERS.id: ServicePolicy(service="orders", **fields)})


BOTH = "maps, proxy"


@pytest.mark.parametrize(
    ("new", "rows"),
    [
        (orders(source="other.yaml:1:1"), []),
        (orders(endpoints=(replace(ORDERS.endpoints[0], source="x:1:1"),)), []),
        (Mesh(generation=9, services=(ORDERS,)), []),
        (governed(name="p", source="x:1:1"), []),
        (orders(addresses=("127.96.0.10", "fd00::1")),
         [("changed", "service", "orders", "addresses", "127.96.0.10", "127.96.0.10, fd00::1", BOTH)]),
        (orders(labels={"team": "shop"}), [("changed", "service", "orders", "labels", "", "team=shop", "names")]),
        (orders(ports=(*HTTP, Port("db", 5432))), [("added", "port", "orders", "db", None, "5432/tcp", BOTH)]),
        (orders(ports=(Port("main", 81, Protocol.TCP),)),
         [("changed", "port", "orders", "main", "80/http", "81/tcp", BOTH)]),
        (orders(endpoints=()), [("removed", "endpoint", "orders", "127.0.0.1:8081", "ready, weight 100", None, BOTH)]),
        (orders(endpoints=(replace(ORDERS.endpoints[0], weight=5, state=EndpointState.DRAINING, zone="a"),)),
         [("changed", "endpoint", "orders", "127.0.0.1:8081 weight", 100, 5, BOTH),
          ("changed", "endpoint", "orders", "127.0.0.1:8081 state", "ready", "draining", BOTH),
          ("changed", "endpoint", "orders", "127.0.0.1:8081 zone", "", "a", "names")]),
        (governed(mode=Mode.DIRECT, on_proxy_down=OnProxyDown.REFUSE),
         [("changed", "policy", "orders", "mode", "auto", "direct", BOTH),
          ("changed", "policy", "orders", "onProxyDown", "direct", "refuse", BOTH)]),
        (governed(timeouts=Timeouts(per_try=2.0), access_log=AccessLogPolicy(slow=9.0)),
         [("changed", "policy", "orders", "timeouts.perTry", 0.0, 2.0, "proxy"),
          ("changed", "policy", "orders", "accessLog.slow", 1.0, 9.0, "proxy")]),
        (Mesh(), [("removed", "service", "orders", None, "127.96.0.10; 80/http; 1 endpoint", None, BOTH)]),
        (Mesh(Agent(maps=MapSizes(slots=7), proxy=ProxySettings(workers=2, drain=9.0)), (ORDERS,)),
         [("changed", "agent", "Agent", "proxy.workers", 1, 2, "restart"),
          ("changed", "agent", "Agent", "proxy.drain", 5.0, 9.0, "proxy"),
          ("changed", "agent", "Agent", "maps.slots", 262144, 7, "restart")]),
    ],
)  # fmt: skip
def test_each_difference_is_a_row(new: Mesh, rows: list[tuple[Any, ...]]) -> None:
    assert seen(OLD, new) == rows


def test_a_new_service_comes_with_its_policy() -> None:
    assert seen(Mesh(), governed(mode=Mode.DIRECT)) == [
        ("added", "service", "orders", None, None, "127.96.0.10; 80/http; 1 endpoint", "maps"),
        ("changed", "policy", "orders", "mode", "auto", "direct", BOTH),
    ]


def test_a_registry_in_the_configuration_is_a_restart() -> None:
    rows = seen(OLD, Mesh(Agent(registries=(EmbeddedRegistry(),)), (ORDERS,)))
    assert {row[-1] for row in rows} == {"restart"}
    assert ("registries[0].store", None, "/var/lib/meshbpf/registry.db") in {row[3:6] for row in rows}


@given(meshes(), meshes())
@settings(deadline=None, max_examples=60)
def test_rows_for_what_is_different_and_none_for_what_is_not(old: Mesh, new: Mesh) -> None:
    assert changes(old, old) == []
    held = plan(old, Tables()).tables
    assert writes(held, old) == []
    before, after_ = plan(old, Tables()).tables, plan(new, held).tables
    if any(getattr(before, table) != getattr(after_, table) for table in TABLES):
        assert changes(old, new) and writes(held, new)


# --- what registries said ------------------------------------------------------------------------------------------

REGISTERED = Endpoint("198.18.0.9", {"main": 8080}, source="registry")
BILLING = Service(
    "billing", addresses=("127.96.26.31",), ports=HTTP, endpoints=(replace(REGISTERED),), source="registry"
)
RUNNING = Mesh(services=(BILLING, replace(ORDERS, endpoints=(*ORDERS.endpoints, REGISTERED))), generation=4)


def test_the_same_files_change_nothing() -> None:
    assert changes(RUNNING, after(RUNNING, Mesh(services=(ORDERS,)))) == []


def test_what_registries_said_stays_when_a_file_goes() -> None:
    rows = seen(RUNNING, after(RUNNING, Mesh()))
    assert ("removed", "endpoint", "orders", "127.0.0.1:8081", "ready, weight 100", None, BOTH) in rows
    assert [row for row in rows if row[2] == "billing" or "198.18.0.9" in str(row[3])] == []


def test_addresses_of_the_pool_stay_and_new_ones_are_those_of_the_name() -> None:
    unnamed = replace(ORDERS, addresses=())
    given = Mesh(services=(replace(ORDERS, addresses=("127.96.99.99",)),))
    assert changes(given, after(given, Mesh(services=(unnamed,)))) == []
    (row,) = [row for row in changes(Mesh(), after(Mesh(), Mesh(services=(unnamed,)))) if row["kind"] == "service"]
    assert row["after"].startswith(choose_address(ipaddress.ip_network(Agent().address_pool), ORDERS.id, ()))


def test_writes_are_counted_by_table_and_refused_when_they_do_not_fit() -> None:
    held = plan(OLD, Tables()).tables
    four = [table for table in TABLES if getattr(held, table)]
    assert writes(held, Mesh()) == [{"map": table, "set": 0, "deleted": 1} for table in four]
    assert writes(Tables(), OLD) == [{"map": table, "set": 1, "deleted": 0} for table in four]
    with pytest.raises(MapFull, match=r"raise Agent\.spec\.maps\.slots"):
        writes(held, Mesh(Agent(maps=MapSizes(slots=0)), (ORDERS,)))
