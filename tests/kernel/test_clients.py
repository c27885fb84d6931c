"""The same endpoint for the same client in the direct carrier: by a Maglev table of who calls."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshbpf.model import ConsistentHash, Endpoint, EndpointState, LoadBalancer, Mesh, Mode, Service
from meshbpf.runtime import netns as runtime_netns
from tests.support import datagrams, netns
from tests.support.datagrams import Server
from tests.support.ground import SIZES, Ground, Listener, mesh, reached, service

ADDRESS, SIX = "127.96.7.1", "fd00:96::7"
IPV6_FREEBIND = 78
LARGE = replace(SIZES, slots=1 << 14)
SOURCES = [f"127.1.{n // 200}.{n % 200 + 1}" for n in range(300)]


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    runtime_netns.Own.fd()  # where the tests begin, before one of them enters another namespace
    with Ground(f"clients-{os.getpid()}") as made:
        made.attach(hashed())
        yield made


def hashed(*services: Service) -> Mesh:
    made = mesh(*services, mode=Mode.DIRECT, sizes=LARGE)
    balance = LoadBalancer(consistent_hash=ConsistentHash(True))
    return replace(made, policies={key: replace(p, load_balancer=balance) for key, p in made.policies.items()})


def led(ground: Ground, listeners: list[Listener], sources: list[str]) -> list[Listener]:
    """Whom a client with each of these addresses reaches."""
    found = []
    for source, sock in zip(sources, ground.clients(len(sources)), strict=True):
        with sock:
            sock.bind((source, 0))
            sock.connect((ADDRESS, 80))
            found.append(reached(*listeners))
    return found


def test_an_address_keeps_its_endpoint_and_addresses_are_spread(ground: Ground, listeners: list[Listener]) -> None:
    weights = (300, 100, 100, 100)
    orders = service("orders", ADDRESS, *(a.endpoint(w) for a, w in zip(listeners, weights, strict=True)))
    ground.plane.apply(hashed(orders))
    found = led(ground, listeners, SOURCES)
    assert led(ground, listeners, SOURCES[:100]) == found[:100]
    # 150 and 50 of 300 expected, standard deviations 8.7 and 6.5: one run in a million would be off by 5 of them, and
    # the addresses are always the same.
    for listener, weight in zip(listeners, weights, strict=True):
        assert abs(found.count(listener) - weight / 2) < 40


def test_who_leaves_takes_nobody_along_and_is_given_back_his_own(ground: Ground, listeners: list[Listener]) -> None:
    every = [a.endpoint() for a in listeners]
    ground.plane.apply(hashed(service("orders", ADDRESS, *every)))
    before = led(ground, listeners, SOURCES)
    drained = [replace(every[0], state=EndpointState.DRAINING), *every[1:]]
    for left in (every[1:], drained, [replace(every[0], weight=0), *every[1:]]):
        ground.plane.apply(hashed(service("orders", ADDRESS, *left)))
        after = led(ground, listeners, SOURCES)
        assert listeners[0] not in after
        moved = sum(new is not old for old, new in zip(before, after, strict=True) if old is not listeners[0])
        assert moved < 30  # a tenth; by a remainder it would be two thirds
    ground.plane.apply(hashed(service("orders", ADDRESS, *reversed(every))))
    assert led(ground, listeners, SOURCES) == before


def test_whoever_is_not_bound_is_his_namespace(ground: Ground, listeners: list[Listener]) -> None:
    """A port without an address says nothing, and neither does the address that an earlier connection had."""
    ground.plane.apply(hashed(service("orders", ADDRESS, *(a.endpoint() for a in listeners))))
    with ground.connect(ADDRESS):
        mine = reached(*listeners)
    mapped = f"::ffff:{ADDRESS}"
    for family, bound in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"), (socket.AF_INET6, None)):
        for _ in range(5):
            with ground.client(family) as sock:
                if bound:
                    sock.bind((bound, 0))
                sock.connect((ADDRESS if family == socket.AF_INET else mapped, 80))
                assert reached(*listeners) is mine
    theirs = led(ground, listeners, SOURCES[:20])
    for source, expected in zip(SOURCES, theirs, strict=False):
        with ground.client(socket.AF_INET6) as sock:  # IPv4 all the same, and so the same client
            sock.bind((f"::ffff:{source}", 0))
            sock.connect((mapped, 80))
            assert reached(*listeners) is expected
    assert {*theirs} != {mine}


def test_namespaces_are_clients_apart(ground: Ground) -> None:
    ends = [Endpoint(f"127.0.0.{n}", {"main": 1001}) for n in (1, 2)]
    ground.plane.apply(hashed(service("orders", ADDRESS, *ends)))
    found = []
    for _ in range(24):
        with netns.fresh(), Listener(ends[0].address, 1001) as a, Listener(ends[1].address, 1001) as b:
            for _again in range(3):
                with ground.connect(ADDRESS):
                    found.append(reached(a, b).address)
    assert found[::3] == found[1::3] == found[2::3]
    assert len(set(found)) == 2  # by chance alone, all 24 would go to one in one run of eight million


def test_both_families(ground: Ground) -> None:
    """An IPv4 socket finds its endpoint without a slot in vain, an IPv6 socket may get any, by weight."""
    ends = [
        Endpoint("127.0.0.1", {"main": 1001}),
        Endpoint("127.0.0.2", {"main": 1001}),
        Endpoint("::1", {"main": 1001}),
    ]
    ground.plane.apply(hashed(service("orders", (ADDRESS, SIX), *ends, port=80)))
    vain = ground.reasons().get("endpoint_vanished", 0)
    found = []
    with netns.fresh(), contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(Listener(end.address, 1001)) for end in ends]
        four = led(ground, listeners, SOURCES[:60])
        assert {*four} == {*listeners[:2]}
        assert led(ground, listeners, SOURCES[:60]) == four
    for _ in range(30):
        with netns.fresh(), contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(Listener(end.address, 1001)) for end in ends]
            with ground.connect(SIX):
                found.append(reached(*listeners).address)
    assert {*found} == {end.address for end in ends}
    assert ground.reasons().get("endpoint_vanished", 0) == vain


def test_udp(ground: Ground) -> None:
    """Connected or not: who is bound to an address has one endpoint, of the right family."""
    with netns.fresh(), contextlib.ExitStack() as stack:
        four = [stack.enter_context(Server(f"127.0.0.{n}")) for n in (1, 2, 3)]
        six = [stack.enter_context(Server("::1")) for _ in range(3)]
        ends = [server.endpoint() for server in (*four, *six)]
        ground.plane.apply(hashed(datagrams.service("dns", (ADDRESS, SIX), *ends)))
        found = {}
        for source in SOURCES[:40]:
            several = []
            for connect in (True, False, False):
                with datagrams.client(ground) as sock:
                    sock.bind((source, 0))
                    several.append(send(sock, (ADDRESS, 53), connect, four))
            (found[source],) = {*several}
        assert {*found.values()} == {*four}
        asked_six = []
        for source in range(1, 41):
            with datagrams.client(ground, socket.AF_INET6) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                sock.bind((f"fd00:1::{source:x}", 0))
                asked_six.append(send(sock, (SIX, 53), False, six))
        assert {*asked_six} == {*six}


def send(sock: socket.socket, address: tuple[str, int], connect: bool, servers: list[Server]) -> Server:
    """Which of the servers gets what the socket sends to the service."""
    if connect:
        sock.connect(address)
    sock.sendto(b"question", address)
    return datagrams.asked(*servers)


def test_a_retry_goes_to_the_next_entry_s_endpoint(ground: Ground) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(f"127.0.0.{n}")) for n in (1, 2, 3)]
        ground.plane.apply(hashed(datagrams.service("dns", ADDRESS, *(server.endpoint() for server in servers))))
        with datagrams.client(ground) as sock:
            first = send(sock, (ADDRESS, 53), False, servers)
            assert send(sock, (ADDRESS, 53), False, servers) is first
            datagrams.pass_a_second(ground)
            assert send(sock, (ADDRESS, 53), False, servers) is not first
