"""`explain` and `reasons`: what they say is what the tables say."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from meshbpf.cli.explain import explain, targets, verdicts
from meshbpf.errors import NotFound
from meshbpf.model import (
    Balance,
    ConnectionPool,
    ConsistentHash,
    Endpoint,
    EndpointState,
    LoadBalancer,
    Maglev,
    Mesh,
    Mode,
    OnProxyDown,
    Port,
    Protocol,
    Service,
    ServicePolicy,
    SessionAffinity,
    TcpPool,
)
from tests.support.plane import attached

ORDERS = Service(
    "orders",
    addresses=("127.96.0.10", "fd00::10"),
    ports=(Port("http", 80, Protocol.HTTP), Port("db", 5432, Protocol.TCP), Port("dns", 53, Protocol.UDP)),
    endpoints=(
        Endpoint("127.0.0.1", {"http": 8081, "db": 1}, weight=2),
        Endpoint("127.0.0.2", {"http": 8081, "dns": 53}, weight=1),
        Endpoint("127.0.0.3", {"http": 8081}, state=EndpointState.DRAINING),
    ),
    source="mesh.yaml:3:1",
)
USERS = Service("users", "shop", addresses=("127.96.0.11",), ports=(Port("http", 80, Protocol.HTTP),))
POLICY = ServicePolicy(
    "strict", "shop", "users", on_proxy_down=OnProxyDown.REFUSE, load_balancer=LoadBalancer(Balance.RANDOM),
    source="mesh.yaml:9:1",
)  # fmt: skip
MESH = Mesh(services=(ORDERS, USERS), policies={("users", "shop"): POLICY})


def said(text: str, mesh: Mesh = MESH, serves: bool = True) -> list[tuple[str, str]]:
    fake, plane = attached(mesh)
    fake.serves = serves
    return explain(plane, mesh, text)


def test_a_governed_port_step_by_step() -> None:
    assert said("127.96.0.10:80") == [
        ("service", "orders port http (80/http), from mesh.yaml:3:1"),
        ("address", "127.96.0.10:80, known to the kernel"),
        ("address", "fd00::10:80, known to the kernel"),
        ("policy", "defaults, no ServicePolicy names it"),
        ("carrier", "proxy: protocol_http"),
        ("without proxy", "onProxyDown direct: while no proxy serves, led to an endpoint, ungoverned"),
        ("balance", "LEAST_REQUEST, by weight"),
        ("endpoint", "127.0.0.1:8081, 66.7% of new connections"),
        ("endpoint", "127.0.0.2:8081, 33.3% of new connections"),
        ("endpoint", "127.0.0.3:8081, never picked: draining, weight 100"),
    ]


def test_a_direct_port_says_what_becomes_of_least_request() -> None:
    steps = said("127.96.0.10:5432")
    assert ("carrier", "direct: protocol_tcp") in steps
    assert any(step == "balance" and says.startswith("ROUND_ROBIN by weight: in direct") for step, says in steps)
    assert ("endpoint", "127.0.0.2: has no port db, never picked") in steps
    assert "without proxy" not in dict(steps)


def test_a_hashed_port_has_shares_of_the_table_for_all() -> None:
    balance = LoadBalancer(consistent_hash=ConsistentHash(True, Maglev(251)))
    six = Endpoint("fd00::1", {"db": 1}, weight=2)
    mixed = replace(ORDERS, ports=(ORDERS.ports[1],), endpoints=(*ORDERS.endpoints[:1], six))
    steps = said("orders", Mesh(services=(mixed,), policies={mixed.id: ServicePolicy(load_balancer=balance)}))
    assert dict(steps)["balance"].startswith("consistentHash by weight, Maglev table of 251: a client is the address")
    assert [says for step, says in steps if step == "endpoint"] == [
        "127.0.0.1:1, 50.2% of clients",
        "fd00::1:1, 49.8% of clients",
    ]


def test_a_limit_and_how_near_it_is() -> None:
    pool = ConnectionPool(tcp=TcpPool(max_connections=7, limits_direct=True))
    ported = replace(ORDERS, ports=(ORDERS.ports[1],))
    mesh = Mesh(services=(ported,), policies={ported.id: ServicePolicy(connection_pool=pool)})
    fake, plane = attached(mesh)
    fake.maps["limits"].rows[(1).to_bytes(4, "little")] = (3).to_bytes(8, "little")
    said = dict(explain(plane, mesh, "orders"))
    assert said["limit"] == "maxConnections 7: 3 open now, one more than that is refused"


def test_a_client_s_endpoint() -> None:
    balance = LoadBalancer(session_affinity=SessionAffinity.CLIENT_IP)
    ported = replace(ORDERS, ports=(ORDERS.ports[1],))
    steps = said("orders", Mesh(services=(ported,), policies={ported.id: ServicePolicy(load_balancer=balance)}))
    assert dict(steps)["affinity"].startswith("ClientIP: the endpoint it had last, until 3h pass without a call; ")
    assert ("endpoint", "127.0.0.1:1, 100% of new clients") in steps


def test_no_endpoint_and_a_policy() -> None:
    steps = dict(said("users.shop"))
    assert steps["policy"] == "policy strict, from mesh.yaml:9:1"
    assert steps["without proxy"] == "onProxyDown refuse: while no proxy serves, refused"
    assert steps["balance"] == "RANDOM"
    assert steps["verdict"] == (
        "no_healthy_upstream: the service has no endpoint that takes new connections: the proxy answers 503"
    )


@pytest.mark.parametrize(
    ("down", "protocol", "serves", "verdict"),
    [
        (OnProxyDown.DIRECT, Protocol.HTTP, True, "no_healthy_upstream: .* the proxy answers 503"),
        (OnProxyDown.DIRECT, Protocol.TCP, True, "no_healthy_upstream: .* the proxy closes the connection"),
        (OnProxyDown.DIRECT, Protocol.HTTP, False, "no_endpoint: .* the caller gets an error"),
        (OnProxyDown.REFUSE, Protocol.HTTP, False, "no_healthy_upstream: "),
    ],
)
def test_the_reason_is_of_who_would_carry_it(down: OnProxyDown, protocol: Protocol, serves: bool, verdict: str) -> None:
    users = replace(USERS, ports=(Port("main", 80, protocol),))
    policy = ServicePolicy(mode=Mode.PROXY, on_proxy_down=down)
    steps = dict(said("users.shop", Mesh(services=(users,), policies={users.id: policy}), serves))
    assert re.match(verdict, steps["verdict"])


def test_how_it_is_now_that_no_proxy_runs() -> None:
    assert "now" not in dict(said("orders:http"))
    steps = dict(said("orders:http", serves=False))
    assert steps["now"] == "no proxy runs: straight to an endpoint (proxy_absent)"
    assert dict(said("users.shop", serves=False))["now"] == "no proxy runs: refused (proxy_down_refused)"
    assert "now" not in dict(said("orders:db", serves=False))


def test_a_udp_port() -> None:
    steps = said("127.96.0.10:53")
    assert ("address", "127.96.0.10:53, known to the kernel") in steps
    assert ("carrier", "direct: protocol_udp") in steps
    assert ("endpoint", "127.0.0.2:53, 100% of new sockets") in steps
    assert dict(steps)["conversation"].startswith("a socket stays with its endpoint")


def test_what_was_taken_out_of_the_kernel_is_seen() -> None:
    plane, reader = attached(MESH)
    plane.forget("127.96.0.10", 80)
    steps = explain(reader, MESH, "127.96.0.10:80")
    assert ("address", "127.96.0.10:80, NOT known to the kernel: connects to it are left alone") in steps
    assert ("address", "fd00::10:80, known to the kernel") in steps


def test_what_the_kernel_does_not_lead_is_left_alone() -> None:
    plane, reader = attached(MESH)
    plane.forget("127.96.0.10", 80)
    plane.forget("fd00::10", 80)
    steps = explain(reader, MESH, "127.96.0.10:80")
    assert [says for step, says in steps if step == "verdict"] == [
        "left alone: the kernel leads no connect to this port"
    ]


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("orders", ["http", "db", "dns"]),
        ("orders.default", ["http", "db", "dns"]),
        ("127.96.0.10:80", ["http"]),
        ("orders:80", ["http"]),
        ("orders:db", ["db"]),
        ("orders.default:dns", ["dns"]),
        ("127.96.0.10:http", ["http"]),
        ("[fd00::10]:5432", ["db"]),
        ("[fd00:0:0::0010]:5432", ["db"]),
        ("users.shop", ["http"]),
    ],
)
def test_what_a_target_may_be(text: str, ports: list[str]) -> None:
    assert [port.name for _service, port in targets(MESH, text)] == ports


THERE = r"80 \(orders http\), 5432 \(orders db\), 53 \(orders dns\)$"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("users", r"service 'users' is unknown; did you mean \"users\.shop\"\?; known: orders, users\.shop$"),
        ("ordres:80", r"service 'ordres' is unknown; did you mean \"orders\"\?; known: orders"),
        ("nobody:80", r"service 'nobody' is unknown; known: orders, users\.shop$"),
        ("127.96.0.10", rf"^127\.96\.0\.10 has no port: give a port: {THERE}"),
        ("[fd00::10]", rf"give a port: {THERE}"),
        ("fd00::10", rf"give a port: {THERE}"),
        ("127.96.0.10:81", rf"^127\.96\.0\.10 has no port 81: a connect to it is left alone; it has {THERE}"),
        ("orders:htp", rf"^orders has no port htp: a connect to it is left alone; it has {THERE}"),
        ("orders:81", rf"^orders has no port 81: a connect to it is left alone; it has {THERE}"),
        ("192.0.2.1:80", r"^192\.0\.2\.1:80 is no service: a connect to it is left alone$"),
        ("192.0.2.1", r"a connect to it is left alone; give a port: ADDRESS:PORT$"),
        (":80", "is unknown; known: orders"),
        ("", "is unknown; known: orders"),
    ],
)
def test_what_is_no_service(text: str, says: str) -> None:
    with pytest.raises(NotFound, match=says):
        targets(MESH, text)


def test_direct_mode_by_policy() -> None:
    policy = ServicePolicy("p", "shop", "users", mode=Mode.DIRECT)
    steps = dict(said("users.shop", Mesh(services=(USERS,), policies={("users", "shop"): policy})))
    assert steps["carrier"] == "direct: policy_mode_direct"


def test_verdicts_are_sorted_and_spelled_out() -> None:
    rows = verdicts({("sockops", "opened"): 3, ("connect", "direct"): 3, ("connect", "proxy"): 9})
    assert [(row["program"], row["reason"], row["count"]) for row in rows] == [
        ("connect", "proxy", 9), ("connect", "direct", 3), ("sockops", "opened", 3),
    ]  # fmt: skip
    assert rows[1]["text"] == "connection led straight to an endpoint"
