"""connectionPool.tcp.maxConnections of a direct port: how many may be open, and that every one is given back."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loader import abi, libbpf
from meshbpf.model import ConnectionPool, Mesh, Mode, Service, TcpPool
from tests.support.ground import Ground, Listener, join, mesh, service
from tests.support.machine import until

ADDRESS, GONE = "127.96.11.1", "127.96.11.2"


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"limit-{os.getpid()}") as made:
        made.attach(mesh())
        yield made


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as made:
        yield made


def limited(most: int, *services: Service) -> Mesh:
    made = mesh(*services, mode=Mode.DIRECT)
    pool = ConnectionPool(tcp=TcpPool(max_connections=most, limits_direct=True))
    return replace(made, policies={key: replace(p, connection_pool=pool) for key, p in made.policies.items()})


def counted(ground: Ground, address: str = ADDRESS) -> int:
    service_id = ground.plane.maps["services"].lookup(bytes(abi.ServiceKey(abi.pack_address(address), 80, 6)))
    assert service_id is not None
    return int.from_bytes(ground.plane.maps["limits"].lookup(service_id) or b"", "little")


class Pair:
    """A connection and its other end: it is open until both have let go."""

    def __init__(self, ground: Ground, listener: Listener) -> None:
        self.client = ground.connect(ADDRESS)
        self.served = listener.accept()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.served.close()


def none_open(ground: Ground) -> None:
    until(lambda: counted(ground) == 0, "every connection is given back")


def refused(ground: Ground) -> int:
    return ground.reasons().get("over_limit", 0)


def test_one_more_than_the_limit_is_refused_until_one_ends(ground: Ground, listener: Listener) -> None:
    ground.plane.apply(limited(3, service("orders", ADDRESS, listener.endpoint())))
    before = refused(ground)
    with Pair(ground, listener), Pair(ground, listener):
        with Pair(ground, listener):
            assert counted(ground) == 3
            for _ in range(2):
                with pytest.raises(ConnectionRefusedError):
                    ground.connect(ADDRESS)
            assert refused(ground) == before + 2
            assert counted(ground) == 3
        until(lambda: counted(ground) == 2, "one has ended")
        with Pair(ground, listener):
            assert counted(ground) == 3
    none_open(ground)


def test_a_lower_limit_holds_for_new_ones_and_a_higher_one_at_once(ground: Ground, listener: Listener) -> None:
    orders = service("orders", ADDRESS, listener.endpoint())
    with contextlib.ExitStack() as stack:
        ground.plane.apply(limited(3, orders))
        for _ in range(3):
            stack.enter_context(Pair(ground, listener))
        ground.plane.apply(limited(1, orders))
        with pytest.raises(ConnectionRefusedError):
            ground.connect(ADDRESS)
        ground.plane.apply(mesh(orders, mode=Mode.DIRECT))  # nothing written down: no limit
        stack.enter_context(Pair(ground, listener))
        ground.plane.apply(limited(4, orders))
        stack.enter_context(Pair(ground, listener))  # the fourth that counts
        with pytest.raises(ConnectionRefusedError):
            ground.connect(ADDRESS)
    none_open(ground)


def abort(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_each_kind_of_end_gives_it_back(ground: Ground, listener: Listener) -> None:
    with Listener() as dead:
        gone = dead.endpoint()
    ground.plane.apply(limited(1, service("orders", ADDRESS, listener.endpoint()), service("gone", GONE, gone)))
    before = refused(ground)
    for _ in range(5):  # nobody listens
        with pytest.raises(ConnectionRefusedError):
            ground.connect(GONE)
    assert counted(ground, GONE) == 0
    for first in ("client", "client resets", "endpoint", "endpoint resets"):
        client, served = ground.connect(ADDRESS), listener.accept()
        assert counted(ground) == 1
        ends = (served, client) if first.startswith("endpoint") else (client, served)
        (abort if first.endswith("resets") else socket.socket.close)(ends[0])
        if ends[0] is served:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        ends[1].close()
        until(lambda: counted(ground) == 0, f"the {first} ended it")
    with ground.client() as client:  # dissolved, and led again
        for _ in range(3):
            client.connect((ADDRESS, 80))
            assert counted(ground) == 1
            assert abi.ct.CDLL(None).connect(client.fileno(), bytes(16), 16) == 0
            assert counted(ground) == 0
    assert refused(ground) == before


def test_a_connection_that_is_given_up_before_it_is_there(ground: Ground) -> None:
    """It counts while its first packet is unanswered."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.socket() as probe:
            probe.connect(full.getsockname())
            with Listener() as lender:
                end = replace(lender.endpoint(), address="127.0.0.1", ports={"main": full.getsockname()[1]})
            ground.plane.apply(limited(2, service("orders", ADDRESS, end)))
            waiting = [ground.client() for _ in range(3)]
            for client in waiting:
                stack.enter_context(client)
                client.setblocking(False)
            codes = [client.connect_ex((ADDRESS, 80)) for client in waiting]
            assert codes[:2] == [errno.EINPROGRESS] * 2
            assert counted(ground) == 2
            waiting[2].setblocking(True)
            with pytest.raises(ConnectionRefusedError):
                waiting[2].connect((ADDRESS, 80))
            waiting[0].close()
            assert counted(ground) == 1
    until(lambda: counted(ground) == 0, "the others are given up, too")


def test_a_connect_that_never_reached_tcp_is_not_counted(ground: Ground, listener: Listener) -> None:
    """Its port is taken by the very same connection: connect() fails after our hook and before the first packet."""
    ground.plane.apply(limited(5, service("orders", ADDRESS, listener.endpoint())))
    with ground.client() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.connect((ADDRESS, 80))
        served = listener.accept()
        before = ground.reasons()["direct"]
        for _ in range(5):
            with ground.client() as second:
                second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                second.bind(first.getsockname())
                with pytest.raises(OSError, match="assign") as raised:
                    second.connect((ADDRESS, 80))
                assert raised.value.errno == errno.EADDRNOTAVAIL
        assert ground.reasons()["direct"] == before + 5  # the hook has seen them
        assert counted(ground) == 1
    served.close()
    none_open(ground)


def test_a_decision_in_the_socket_s_own_storage_counts_as_well(ground: Ground, listener: Listener) -> None:
    ground.plane.apply(limited(2, service("orders", ADDRESS, listener.endpoint())))
    size = abi.ct.sizeof(abi.Recent)
    with libbpf.Map(ground.plane.maps_folder / "recent", 4, size, abi.RECENT_PLACES) as recent:
        taken = abi.Recent(decision=abi.Decision(watched=1))
        for index in range(abi.RECENT_PLACES):
            taken.cookie = (1 << 63) + index
            recent.update(index.to_bytes(4, "little"), bytes(taken))
        try:
            with Pair(ground, listener), Pair(ground, listener):
                assert counted(ground) == 2
                with pytest.raises(ConnectionRefusedError):
                    ground.connect(ADDRESS)
            none_open(ground)
        finally:
            for index in range(abi.RECENT_PLACES):
                recent.update(index.to_bytes(4, "little"), bytes(size))


def test_many_processes_at_once(ground: Ground, listener: Listener) -> None:
    """Each holds one connection at a time, so the limit is reached all the time; in the end all is given back."""
    most, processes = 3, 12
    ground.plane.apply(limited(most, service("orders", ADDRESS, listener.endpoint())))
    before = refused(ground)
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                join(ground.cgroup)
                _churn()
            os._exit(0)
        children.append(child)
    seen = 0
    listener.socket.setblocking(False)
    while children:
        with contextlib.suppress(BlockingIOError):
            listener.accept().close()
        seen = max(seen, counted(ground))
        pid, _status = os.waitpid(-1, os.WNOHANG)
        if pid:
            children.remove(pid)
    assert refused(ground) > before
    assert most <= seen <= most + 2 * (os.cpu_count() or 1)
    assert counted(ground) == 0


def _churn() -> None:
    for _ in range(200):
        with socket.socket() as sock, contextlib.suppress(ConnectionRefusedError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.connect((ADDRESS, 80))
            os.sched_yield()
