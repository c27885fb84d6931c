"""Who calls what: rows of `connections` and `edges` from the kernel's tables, the sockets and the agent's counts."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from typing import Any

import pytest

from loader import abi
from loader.sockets import ANSWER, Led, read
from meshbpf.cli import calls
from meshbpf.model import Mesh, Port, Protocol, Service
from tests.support.plane import FakeMap, FakePlane, attached

ORDERS = Service("orders", addresses=("127.96.0.10", "fd00::10"), ports=(Port("http", 80, Protocol.HTTP),))
LEDGER = Service("ledger", addresses=("127.96.0.11",), ports=(Port("tcp", 7000), Port("more", 7001)))
DNS = Service("dns", addresses=("127.96.0.12",), ports=(Port("udp", 53, Protocol.UDP),))
MESH = Mesh(services=(DNS, LEDGER, ORDERS))
LED = Led(1, abi.Carried.DIRECT, 7, 42, 3, ("127.0.0.1", 4000), ("127.96.0.11", 7000), ("127.0.0.1", 9))


def flow(plane: FakePlane, service_id: int, port: int, cgroup: int, pid: int) -> None:
    key = abi.FlowKey(netns=3, address=abi.pack_address("127.0.0.1"), port=port)
    value = abi.FlowValue(
        cgroup=cgroup, asked=abi.pack_address("127.96.0.10"), asked_port=80, service_id=service_id, pid=pid
    )
    plane.maps.setdefault("flows", FakeMap({})).rows[bytes(key)] = bytes(value)


def setting() -> tuple[FakePlane, Any, calls.Names]:
    fake, plane = attached(MESH)
    fake.maps["flows"], fake.maps["connected"] = FakeMap({}), FakeMap({})
    return fake, plane, calls.names(plane, MESH)


def id_of(known: calls.Names, service: str, port: str) -> int:
    (found,) = [key for key, (one, port_) in known.items() if (one.name, port_.name) == (service, port)]
    return found


def test_every_port_has_one_name_under_all_its_addresses() -> None:
    _fake, _plane, known = setting()
    assert sorted((service.name, port.name) for service, port in known.values()) == [
        ("dns", "udp"), ("ledger", "more"), ("ledger", "tcp"), ("orders", "http"),
    ]  # fmt: skip


def test_open_connections_by_carrier() -> None:
    """A governed port whose proxy was down has had direct ones too. A close seen before its open is no minus one."""
    fake, plane, known = setting()
    fake.count("127.96.0.10", 80, (2, 9, 2, 4))
    fake.count("127.96.0.11", 7000, (5, 0, 6, 0))
    rows = calls.connections(plane, known)
    assert [(row["service"], row["port"], row["carrier"], row["open"], row["opened"]) for row in rows] == [
        ("ledger", "7000/tcp", "direct", 0, 5),
        ("orders", "80/http", "direct", 0, 2),
        ("orders", "80/http", "proxy", 5, 9),
    ]
    assert [row["service"] for row in calls.connections(plane, known, LEDGER)] == ["ledger"]


def test_clients_of_both_carriers() -> None:
    fake, plane, known = setting()
    flow(fake, id_of(known, "orders", "http"), 5001, 8, 43)
    proxied = Led(
        id_of(known, "orders", "http"), abi.Carried.PROXY, 8, 43, 3, ("127.0.0.1", 5001), ("::", 0), ("::", 0)
    )
    direct = Led(id_of(known, "ledger", "tcp"), abi.Carried.DIRECT, 7, 42, 3, LED.client, LED.asked, LED.given)
    found = calls.clients(plane, [direct, proxied], nobody)
    assert sorted((one.carrier, one.client, one.asked, one.endpoint, one.pid) for one in found) == [
        ("direct", "127.0.0.1:4000", "127.96.0.11:7000", "127.0.0.1:9", 42),
        ("proxy", "127.0.0.1:5001", "127.96.0.10:80", "", 43),
    ]
    assert [one.carrier for one in calls.clients(plane, None, nobody)] == ["proxy"], "sockets that cannot be asked"
    rows = calls.client_rows(found, known, lambda id: f"w{id}", lambda id: "" if id == 8 else f"/c{id}")
    assert {(row["service"], row["port"], row["workload"], row["cgroup"]) for row in rows} == {
        ("ledger", "7000/tcp", "w7", "/c7"), ("orders", "80/http", "w8", None),
    }  # fmt: skip
    assert [row["service"] for row in calls.client_rows(found, known, str, str, ORDERS)] == ["orders"]


def test_connected_udp_sockets_have_a_process() -> None:
    fake, plane, known = setting()
    for cookie, pid in ((1, 42), (2, 43)):
        value = abi.Connected(
            netns=3, given=abi.pack_address("127.0.0.1"), given_port=53, service_id=id_of(known, "dns", "udp"), pid=pid
        )
        fake.maps["connected"].rows[cookie.to_bytes(8, "little")] = bytes(value)
    rows = calls.client_rows(
        calls.clients(plane, [], lambda pid: 7 if pid == 42 else 0), known, lambda id: f"w{id}", str
    )
    assert [(row["pid"], row["workload"], row["client"], row["endpoint"]) for row in rows] == [
        (42, "w7", None, "127.0.0.1:53"), (43, None, None, "127.0.0.1:53"),
    ]  # fmt: skip
    assert seen(calls.edges(rows, None, True)) == [("w7", "dns", "direct", 1, None, None, None, None)]


def nobody(_pid: int) -> int:
    return 0


def test_a_connection_to_a_service_that_is_gone_is_still_somebody_s() -> None:
    _fake, plane, known = setting()
    (row,) = calls.client_rows(calls.clients(plane, [Led(99, *LED_REST)], nobody), known, str, str)
    assert (row["service"], row["port"], row["pid"]) == (None, None, 42)
    assert calls.client_rows(calls.clients(plane, [Led(99, *LED_REST)], nobody), known, str, str, ORDERS) == []
    assert calls.edges([row], None, True) == []


LED_REST = (LED.carrier, LED.cgroup, LED.pid, LED.netns, LED.client, LED.asked, LED.given)
OPEN = [
    {"service": "orders", "workload": "shop", "carrier": "proxy"},
    {"service": "orders", "workload": "shop", "carrier": "proxy"},
    {"service": "ledger", "workload": "shop", "carrier": "direct"},
]
COUNTS = {
    "connections_total": [["outbound", "shop", "orders", "proxy", 5], ["outbound", "cron", "orders", "proxy", 1]],
    "requests_total": [
        ["outbound", "shop", "orders", "-", "200", "-", "proxy", 997],
        ["outbound", "shop", "orders", "r1", "404", "-", "proxy", 1],
        ["outbound", "shop", "orders", "-", "503", "UF", "proxy", 1],
        ["outbound", "shop", "orders", "-", "-", "DC", "proxy", 1],
    ],
    "proxy_verdicts_total": [],
}


def seen(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("workload", "service", "carrier", "open", "connections", "requests", "failed", "success_percent")
    return [tuple(row[key] for key in keys) for row in rows]


def test_edges_join_what_is_open_and_what_was_counted() -> None:
    assert seen(calls.edges(OPEN, COUNTS, True)) == [
        ("cron", "orders", "proxy", 0, 1, None, None, None),
        ("shop", "ledger", "direct", 1, None, None, None, None),
        ("shop", "orders", "proxy", 2, 5, 1000, 2, 99.8),
    ]


def test_edges_without_an_agent_are_the_open_ones() -> None:
    assert seen(calls.edges(OPEN, None, True)) == [
        ("shop", "ledger", "direct", 1, None, None, None, None),
        ("shop", "orders", "proxy", 2, None, None, None, None),
    ]


@pytest.mark.parametrize(
    ("part", "whole", "says"),
    [
        (0, 0, 0.0),
        (0, 5, 0.0),
        (5, 5, 100.0),
        (999_999, 1_000_000, 99.9),
        (1, 1_000_000, 0.1),
        (1, 3, 33.3),
    ],
)
def test_percent_never_rounds_a_failure_away(part: int, whole: int, says: float) -> None:
    assert calls.percent(part, whole) == says


def attribute(kind: int, body: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(body), kind) + body + bytes(-len(body) % 4)


def answer(family: int, address: str, origin: abi.Origin) -> bytes:
    packed = socket.inet_pton(family, address).ljust(16, b"\0")
    message = ANSWER.pack(family, 1, 0, 0, (4000).to_bytes(2, "big"), bytes(2), packed, bytes(16), 9, 0, 0, 0, 0)
    storage = attribute(1 | 0x8000, attribute(2, bytes(4)) + attribute(3, bytes(origin)))
    return message + attribute(8, bytes(1)) + attribute(20 | 0x8000, storage)


def origin(counted: int = 1) -> abi.Origin:
    decision = abi.Decision(
        asked=abi.pack_address("127.96.0.11"), given=abi.pack_address("127.0.0.1"), asked_port=7000, given_port=9,
        service_id=1, carrier=abi.Carried.DIRECT, counted=counted,
    )  # fmt: skip
    return abi.Origin(netns=3, cgroup=7, pid=42, decision=decision)


def test_a_socket_tells_what_was_decided_of_it() -> None:
    assert read(answer(socket.AF_INET, "127.0.0.1", origin()), {}) == LED
    assert read(answer(socket.AF_INET6, "::ffff:127.0.0.1", origin()), {}) == LED
    six = read(answer(socket.AF_INET6, "fd00::1", origin()), {})
    assert six is not None and six.client == ("fd00::1", 4000)


def test_a_direct_socket_is_known_by_its_cookie_and_the_kernel_s_word_on_its_cgroup() -> None:
    message = answer(socket.AF_INET, "127.0.0.1", origin(counted=0)) + attribute(21, (77).to_bytes(8, "little"))
    found = read(message, {9: origin().decision})
    assert found == replace(LED, cgroup=77, pid=0, netns=0)
    assert read(message, {8: origin().decision}) is None


def test_a_socket_that_is_not_ours_or_was_connected_elsewhere_tells_nothing() -> None:
    assert read(answer(socket.AF_INET, "127.0.0.1", origin(counted=0)), {}) is None
    assert read(answer(socket.AF_INET, "127.0.0.1", origin())[: ANSWER.size + 8], {}) is None
