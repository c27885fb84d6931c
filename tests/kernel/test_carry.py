"""An upgrade to tables of another layout: UDP sockets keep their endpoints, and clients theirs."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loader import abi, dataplane
from meshbpf.model import LoadBalancer, MapSizes, Mesh, Mode, Service, SessionAffinity
from meshbpf.runtime import netns as runtime_netns
from tests.kernel.test_udp import ADDRESS, DNS, OTHER, alive, counts, end, ended
from tests.support.datagrams import Server, asked, client, service
from tests.support.ground import SIZES, Ground, Listener, mesh, reached
from tests.support.ground import service as tcp_service

LARGER = MapSizes(services=512, slots=4096, endpoints=512, policies=128, flows=1024, members=64)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    runtime_netns.Own.fd()
    with Ground(f"carry-{os.getpid()}") as made:
        yield made


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made = [Server(f"127.0.0.{n}") for n in (1, 2, 3)]
    yield made
    for server in made:
        server.close()


def first(*services: Service) -> Mesh:
    """Of the earlier layout, with numbers that the next one gives to others."""
    others = [service(f"a{n}", f"127.96.54.{n}", Server().endpoint()) for n in (1, 2, 3)]
    return mesh(*others, *services)


def upgraded(*services: Service) -> Mesh:
    return mesh(*services, sizes=LARGER)


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE


def connected(ground: Ground) -> set[int]:
    return {int.from_bytes(key, "little") for key, _ in ground.plane.maps["connected"].items()}


def test_connected_sockets_are_carried(ground: Ground, servers: list[Server]) -> None:
    a, b, _ = servers
    ground.attach(first(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, b.endpoint())))
    with client(ground) as one, client(ground) as two, client(ground) as after:
        one.connect(DNS)
        two.connect((OTHER, 53))
        names = [service("dns", ADDRESS, a.endpoint(), b.endpoint()), service("more", OTHER, b.endpoint())]
        ground.attach(upgraded(*names))
        assert alive(one, a, DNS) and alive(two, b, (OTHER, 53)), "answers are shown as the service's"
        after.connect(DNS)
        after.send(b"hello")
        led_after = asked(a, b)
        assert connected(ground) == {cookie(one), cookie(two), cookie(after)}
        assert end(ground) == 0
        ground.attach(upgraded(service("dns", ADDRESS, b.endpoint()), names[1]))
        assert end(ground) == (2 if led_after is a else 1)
        with pytest.raises(ConnectionAbortedError):
            one.recv(100)
        assert not ended(two) and alive(two, b, (OTHER, 53))
    opened, closed = counts(ground)
    assert (opened, closed) == (1, 1), "those from before are not counted here"
    assert connected(ground) == set()


def test_an_endpoint_that_leaves_with_the_upgrade_takes_its_sockets_along(
    ground: Ground, servers: list[Server]
) -> None:
    a, b, _ = servers
    ground.attach(first(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, b.endpoint())))
    with client(ground) as gone, client(ground) as stays:
        gone.connect(DNS)
        stays.connect((OTHER, 53))
        ground.attach(upgraded(service("dns", ADDRESS, b.endpoint())))
        assert end(ground) == 1
        assert ended(gone)
        assert alive(stays, b, (OTHER, 53)), "nobody said that this endpoint is gone"


def test_a_carried_socket_that_goes_elsewhere_is_forgotten(ground: Ground, servers: list[Server]) -> None:
    a, b, _ = servers
    ground.attach(first(service("dns", ADDRESS, a.endpoint())))
    with client(ground) as sock:
        sock.connect(DNS)
        ground.attach(upgraded(service("dns", ADDRESS, a.endpoint())))
        sock.connect((b.address, b.port))
        assert connected(ground) == set()
        sock.connect((a.address, a.port))
        assert alive(sock, a, (a.address, a.port)), "by its own address it is nobody's service"


def test_conversations_go_on(ground: Ground, servers: list[Server]) -> None:
    names = service("dns", ADDRESS, *(server.endpoint() for server in servers))
    ground.attach(first(names))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(client(ground)) for _ in range(9)]
        before = []
        for sock in socks:
            sock.sendto(b"hello", DNS)
            before.append(asked(*servers))
            before[-1].socket.sendto(b"late", sock.getsockname())
        assert set(before) == set(servers)
        ground.attach(upgraded(names))
        for sock, server in zip(socks, before, strict=True):
            assert sock.recvfrom(100) == (b"late", DNS), "what was under way is shown as the service's"
            sock.sendto(b"more", DNS)
            assert asked(*servers) is server
            server.socket.sendto(b"answer", sock.getsockname())
            assert sock.recvfrom(100) == (b"answer", DNS)


def test_sockets_come_and_go_between_any_two_steps(ground: Ground, servers: list[Server]) -> None:
    """The new tables have all that are open in the end, and none of those that are not."""
    a = servers[0]
    names = service("dns", ADDRESS, a.endpoint())
    ground.attach(first(names))

    def made() -> socket.socket:
        sock = client(ground)
        sock.connect(DNS)
        return sock

    with contextlib.ExitStack() as stack:
        old = [made() for _ in range(40)]
        steps, brief = 0, []
        with ground.instance.lock():
            for _step in dataplane.attach_steps(ground.instance, [ground.cgroup], upgraded(names)):
                steps += 1
                old.pop().close()
                for sock in brief:
                    sock.close()
                brief = [made()]  # closed after the next step
                old.insert(0, made())
        for sock in brief:
            sock.close()
        assert steps >= len(dataplane.CGROUP_HOOKS)
        for sock in old:
            stack.callback(sock.close)
        assert connected(ground) == {cookie(sock) for sock in old}


def test_clients_keep_their_endpoints(ground: Ground) -> None:
    def sticky(*services: Service, sizes: MapSizes = SIZES) -> Mesh:
        made = mesh(*services, mode=Mode.DIRECT, sizes=sizes)
        balance = LoadBalancer(session_affinity=SessionAffinity.CLIENT_IP)
        return replace(made, policies={key: replace(p, load_balancer=balance) for key, p in made.policies.items()})

    def call(source: str) -> Listener:
        with ground.client() as sock:
            sock.bind((source, 0))
            sock.connect((ADDRESS, 80))
            return reached(*listeners)

    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(Listener(f"127.0.0.{n}")) for n in range(1, 5)]
        ends = [listener.endpoint() for listener in listeners]
        clients = [f"127.0.1.{n}" for n in range(1, 12)]
        ground.attach(sticky(tcp_service("a", OTHER, ends[0]), tcp_service("web", ADDRESS, *ends)))
        before = [call(source) for source in clients]
        assert len(set(before)) > 1
        ground.attach(sticky(tcp_service("web", ADDRESS, *reversed(ends)), sizes=LARGER))
        assert [call(source) for source in clients] == before


def test_an_upgrade_back_and_forth(ground: Ground, servers: list[Server]) -> None:
    a = servers[0]
    names = service("dns", ADDRESS, a.endpoint())
    ground.attach(first(names))
    with client(ground) as sock:
        sock.connect(DNS)
        for number in range(3):
            ground.attach(first(names) if number % 2 else upgraded(names))
            assert alive(sock, a, DNS)
            assert connected(ground) == {cookie(sock)}
    assert connected(ground) == set()
    assert abi.Connected.carried.size == 1
