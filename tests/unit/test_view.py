"""Rows of the reading commands, from a mesh and the tables it made."""

from __future__ import annotations

import pytest

from meshbpf.cli import view
from meshbpf.errors import NotFound
from meshbpf.model import Endpoint, EndpointState, Mesh, Port, Protocol, Service
from tests.support.plane import attached

ORDERS = Service(
    "orders",
    addresses=("127.96.0.10", "fd00::10"),
    ports=(Port("http", 80, Protocol.HTTP), Port("dns", 53, Protocol.UDP)),
    endpoints=(
        Endpoint("127.0.0.1", {"http": 8081, "dns": 53}, zone="a", source="mesh.yaml"),
        Endpoint("fd00::1", {"http": 8082}, weight=0),
        Endpoint("127.0.0.3", {"http": 8083}, state=EndpointState.DRAINING),
    ),
    source="mesh.yaml:3:1",
)
USERS = Service("users", "shop", addresses=("127.96.0.11",), ports=(Port("db", 5432, Protocol.TCP),))
MESH = Mesh(services=(ORDERS, USERS))


def test_services() -> None:
    plane, reader = attached(MESH)
    plane.count("127.96.0.10", 80, (3, 4, 1, 2))
    rows = view.services(reader, MESH)
    assert [(row["service"], row["port"], row["carrier"], row["why"], row["endpoints"]) for row in rows] == [
        ("orders", "80/http", "proxy", "protocol_http", "1/3"),
        ("orders", "53/udp", "direct", "protocol_udp", "1/1"),
        ("users.shop", "5432/tcp", "direct", "protocol_tcp", "0/0"),
    ]
    assert [(row["open"], row["connections"]) for row in rows] == [(4, 7), (0, 0), (0, 0)]
    assert rows[0]["address"] == "127.96.0.10,fd00::10"


def test_a_service_that_the_kernel_knows_by_one_address_only() -> None:
    plane, reader = attached(MESH)
    plane.forget("fd00::10", 80)
    assert view.services(reader, MESH)[0]["why"] == "not_in_kernel"


def test_endpoints_with_what_the_workers_saw() -> None:
    plane, reader = attached(MESH)
    health = {
        "orders 127.0.0.1:8081": {"ok": 5, "failed": 1, "last_error": "connect_failed", "last_error_seconds": 3.0}
    }
    rows = view.endpoints(reader, MESH, None, health)
    assert [(row["endpoint"], row["port"], row["state"], row["weight"], row["ok"]) for row in rows] == [
        ("127.0.0.1:8081", "http", "ready", 100, 5),
        ("127.0.0.1:53", "dns", "ready", 100, None),
        ("[fd00::1]:8082", "http", "ready", 0, None),
        ("127.0.0.3:8083", "http", "draining", 100, None),
    ]
    assert [(row["last_error"], row["last_error_seconds"]) for row in rows[:2]] == [
        ("connect_failed", 3.0),
        (None, None),
    ]
    plane.tables.endpoints.clear()
    assert [row["state"] for row in view.endpoints(reader, MESH, None, {})] == [
        "not_in_kernel", "not_in_kernel", "not_in_kernel", "not_in_kernel",
    ]  # fmt: skip


def test_endpoints_of_one_service() -> None:
    _plane, reader = attached(MESH)
    assert view.endpoints(reader, MESH, USERS, {}) == []
    assert len(view.endpoints(reader, MESH, ORDERS, {})) == 4


def test_find() -> None:
    assert view.find(MESH, "orders") is ORDERS
    assert view.find(MESH, "orders.default") is ORDERS
    assert view.find(MESH, "users.shop") is USERS
    with pytest.raises(NotFound, match=r"'users' is unknown; did you mean .users\.shop.\?; known: orders, users\.shop"):
        view.find(MESH, "users")
    with pytest.raises(NotFound, match="known: none"):
        view.find(Mesh(), "orders")


def test_hosts() -> None:
    assert view.hosts(MESH).splitlines() == [
        "127.96.0.10\torders orders.default",
        "fd00::10\torders orders.default",
        "127.96.0.11\tusers.shop",
    ]
